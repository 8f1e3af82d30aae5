const articles = [...document.querySelectorAll('article')];
const status = document.getElementById('shown');
function show(cell) {
  for (const a of articles) a.hidden = cell !== '' && !a.dataset.cells.split(' ').includes(cell);
  const n = articles.filter(a => !a.hidden).length;
  status.textContent = cell === '' ? `all ${n} findings` : `${n} of ${articles.length} findings: ${cell.replaceAll('/', ' ')}`;
}
document.addEventListener('click', event => {
  const button = event.target.closest('button[data-cell]');
  if (!button) return;
  show(button.dataset.cell);
  status.scrollIntoView({block: 'start'});
});
show('');
