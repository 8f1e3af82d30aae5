// Filters, addresses of what is open, and arrow keys from cell to cell. All else works without.
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const [form] = all('form'), [count] = all('output');

function filter() {
  const words = form.find.value.toLowerCase().split(/\s+/);
  const chosen = name => all(`[name=${name}]:checked`).map(box => box.value);
  const states = chosen('state'), columns = chosen('column');
  const among = (list, one) => !list.length || list.includes(one);
  for (const cell of all('[data-column]')) cell.hidden = !among(columns, cell.dataset.column);
  const rows = all('tr[data-find]');
  for (const row of rows) {
    const found = words.every(word => row.dataset.find.includes(word));
    row.hidden = !(found && all('td:not([hidden])', row).some(cell => among(states, cell.dataset.state)));
  }
  for (const group of all('#board tbody')) group.hidden = !all('tr[data-find]:not([hidden])', group).length;
  count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} rules`;
}
form.addEventListener('input', filter);
form.addEventListener('submit', event => event.preventDefault());
form.addEventListener('reset', () => setTimeout(filter));

function open() {
  const named = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (named?.popover && !named.matches(':popover-open')) named.showPopover();
}
addEventListener('hashchange', open);
document.addEventListener('toggle', event => {
  if (!event.target.popover) return;
  const opened = event.newState == 'open';
  history.replaceState(null, '', opened ? '#' + event.target.id : location.pathname + location.search);
  if (opened) event.target.scrollTop = 0;
}, true);

const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
document.addEventListener('keydown', event => {
  const at = event.target.closest('#board tr[data-find] > *'), step = steps[event.key];
  if (!at || !step) return;
  const grid = all('#board tr[data-find]:not([hidden])').map(row => all('th, td:not([hidden])', row));
  let y = grid.findIndex(row => row.includes(at)), x = grid[y].indexOf(at), button;
  do {
    y += step[0];
    x += step[1];
    button = grid[y]?.[x]?.querySelector('button');
  } while (!button && grid[y]?.[x]);
  if (button) {
    button.focus();
    event.preventDefault();
  }
});

filter();
open();
