// Reads the conformance vectors with Node's own library: `node read_vectors.js FOLDER OPERATION < LINES`.
// A line asks for a tensor, as `quantize_4bit/nf4-size-1 inputs x`; the answer is its dtype, its shape, and its bytes in hexadecimal.
const {readFileSync} = require('fs');

// ten lines
function load(folder, operation) {
  const body = JSON.parse(readFileSync(`${folder}/${operation}.json`, 'utf8'));
  const data = readFileSync(`${folder}/${body.tensors}`);
  const start = 8 + Number(data.readBigUInt64LE(0));
  const header = JSON.parse(data.toString('utf8', 8, start));
  const tensor = key => {
    const {dtype, shape, data_offsets: [first, last]} = header[key];
    return {dtype, shape, bytes: data.subarray(start + first, start + last)};
  };
  return {cases: Object.fromEntries(body.cases.map(one => [one.id, one])), tensor};
}
// end

const {cases, tensor} = load(process.argv[2], process.argv[3]);
for (const line of readFileSync(0, 'utf8').split('\n').filter(Boolean)) {
  const [id, part, name] = line.split(' ');
  const found = cases[id][part][name];
  const {dtype, shape, bytes} = tensor(part === 'inputs' ? found : found.value);
  console.log(dtype, shape.join(','), bytes.toString('hex'));
}
