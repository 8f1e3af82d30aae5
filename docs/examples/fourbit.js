// NF4 and FP4 in JavaScript, for the conformance kit's pipe: reads cases on stdin, writes results on stdout. Needs nothing but Node.
//
//   python -m bnbref vectors gen quantize_4bit | node fourbit.js | python -m bnbref vectors check quantize_4bit
//   python -m bnbref vectors gen dequantize_4bit | node fourbit.js | python -m bnbref vectors check dequantize_4bit
//
// Numbers are doubles in JavaScript; Math.fround rounds one to float32. A product or a quotient of two float32 that is rounded to a
// double and then to float32 is the one that is rounded once: 53 bits are more than twice 24.
"use strict";

const f = Math.fround;
const view = new DataView(new ArrayBuffer(4));
const fromBits = (bits) => (view.setUint32(0, bits), view.getFloat32(0));
const toBits = (x) => (view.setFloat32(0, x), view.getUint32(0));

// Section "Values" of the page of quantize_4bit.
const VALUES = {
  nf4: [
    0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000,
    0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000,
  ].map(fromBits),
  fp4: [
    0x00000000, 0x3baaaaab, 0x3f2aaaab, 0x3f800000, 0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000,
    0x00000000, 0xbbaaaaab, 0xbf2aaaab, 0xbf800000, 0xbeaaaaab, 0xbf000000, 0xbe2aaaab, 0xbe800000,
  ].map(fromBits),
};
const MIDPOINTS = VALUES.nf4.slice(1).map((value, i) => f(f(value + VALUES.nf4[i]) / 2)); // Q4-3
const FP4_THRESHOLDS = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333].map(f); // Q4-4
const FP4_ORDER = [0, 1, 6, 7, 4, 5, 2, 3]; // Q4-3
const SMALLEST_NORMAL = 2 ** -126;

const below = (thresholds, x) => thresholds.filter((t) => t < x).length; // a NaN is above none
const codeOf = {
  nf4: (scaled) => below(MIDPOINTS, scaled),
  fp4: (scaled) => FP4_ORDER[below(FP4_THRESHOLDS, Math.abs(scaled))] + (scaled < 0 ? 8 : 0), // Q4-5
};

// Rules Q4-1 to Q4-8: packed bytes, and an absmax for each block.
function quantize(x, blocksize, type) {
  const packed = new Uint8Array(Math.ceil(x.length / 2)), absmax = [];
  for (let start = 0; start < x.length; start += blocksize) {
    const block = x.slice(start, start + blocksize);
    const largest = block.reduce((m, v) => (Math.abs(v) > m ? Math.abs(v) : m), 0); // a NaN is not larger
    const scale = largest >= SMALLEST_NORMAL ? largest : 0;
    const reciprocal = scale > 0 ? f(1 / scale) : 0;
    absmax.push(scale);
    block.forEach((v, j) => {
      const i = start + j;
      packed[i >> 1] |= codeOf[type](f(v * reciprocal)) << (i % 2 ? 0 : 4); // Q4-6
    });
  }
  if (x.length % 2) packed[x.length >> 1] |= VALUES[type].indexOf(0);
  return { packed, absmax };
}

// Rules D4-1 and D4-2, in float32.
function dequantize(packed, absmax, n, blocksize, type) {
  return Array.from({ length: n }, (_, i) => {
    const code = i % 2 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4;
    return f(VALUES[type][code] * absmax[Math.floor(i / blocksize)]);
  });
}

// The formats of 16 bits: to float32, which is exact, and from it, to nearest even.
const read = {
  float32: fromBits,
  bfloat16: (bits) => fromBits(bits * 65536),
  float16: (bits) => {
    const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  },
};
const roundEven = (x) => { const down = Math.floor(x), rest = x - down; return rest > 0.5 || (rest === 0.5 && down % 2) ? down + 1 : down; };
const write = {
  float32: toBits,
  bfloat16: (x) => (x !== x ? 0x7fc0 : roundEven(toBits(x) / 65536)),
  float16: (x) => {
    const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0, magnitude = Math.abs(x);
    if (x !== x) return 0x7e00;
    if (magnitude === Infinity) return sign | 0x7c00;
    const exponent = Math.max(-14, magnitude ? Math.floor(Math.log2(magnitude)) : -14);
    const units = roundEven(magnitude * 2 ** (10 - exponent)); // of 2^(exponent - 10); 1024 and more is normal
    return sign | Math.min(0x7c00, units + (exponent + 14) * 1024);
  },
};
const DIGITS = { float32: 8, bfloat16: 4, float16: 4, uint8: 2 };
const line = (name, dtype, shape, words) =>
  ["tensor", name, dtype, shape.length, ...shape, ...words.map((w) => w.toString(16).padStart(DIGITS[dtype], "0"))].join(" ");

function answer(id, params, tensors) {
  const blocksize = Number(params.blocksize), type = params.quant_type;
  if (id.startsWith("quantize_4bit/")) {
    const { packed, absmax } = quantize(tensors.x, blocksize, type);
    return [line("packed", "uint8", [packed.length], [...packed]), line("absmax", "float32", [absmax.length], absmax.map(toBits))];
  }
  if (id.startsWith("dequantize_4bit/")) {
    const shape = params.shape.split(",").map(Number), n = shape.reduce((a, b) => a * b, 1);
    const y = dequantize(tensors.packed, tensors.absmax, n, blocksize, type);
    return [line("y", params.dtype, shape, y.map(write[params.dtype]))];
  }
  return ["unsupported"];
}

let id = "", params = {}, tensors = {};
for (const text of require("fs").readFileSync(0, "utf8").split("\n")) {
  const [word, name, ...rest] = text.split(" ");
  if (word === "case") [id, params, tensors] = [name, {}, {}];
  if (word === "param") params[name] = rest[0];
  if (word === "tensor") {
    const [dtype, dims, ...words] = rest;
    tensors[name] = words.slice(Number(dims)).map((w) => (read[dtype] || Number)(parseInt(w, 16)));
  }
  if (word === "end") console.log(["case " + id, ...answer(id, params, tensors), "end"].join("\n"));
}
