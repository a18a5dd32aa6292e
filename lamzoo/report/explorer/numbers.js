// First part of the explorer page's script: the data, and rows of masks and attention computed of their factors.
"use strict";

const page = JSON.parse(document.getElementById("data").textContent);
const state = { layer: 0, head: -1, query: 0, key: 0, pinned: false, photo: true }; // head -1: the mean over all
const MAPS = [
  ["mask", "mask M[i, j]"],
  ["masked", "attention with mask"],
  ["plain", "attention without"],
  ["difference", "with − without"],
];

const $ = (id) => document.getElementById(id);

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Numbers. A matrix is stored as int16 with one scale a row.

const bytes = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0)).buffer;
const decoded = [];

function matrix(index) {
  const { columns, values, scales } = page.arrays[index];
  decoded[index] ??= { columns, values: new Int16Array(bytes(values)), scales: new Float32Array(bytes(scales)) };
  return decoded[index];
}

function dot(a, row, b, other) {
  let sum = 0;
  for (let c = 0, x = row * a.columns, y = other * b.columns; c < a.columns; c++) sum += a.values[x++] * b.values[y++];
  return sum * a.scales[row] * b.scales[other];
}

function softmax(scores) {
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  if (most === -Infinity) return scores.fill(0); // nothing is allowed
  let sum = 0;
  for (let j = 0; j < scores.length; j++) sum += scores[j] = Math.exp(scores[j] - most);
  return scores.map((value) => value / sum);
}

function bias(layer, head, query) {
  if (layer.bias === null) return () => 0;
  const { values, scales, columns } = matrix(layer.bias.array);
  const row = (layer.bias.heads > 1 ? head : 0) * layer.bias.queries + (layer.bias.queries > 1 ? query : 0);
  return (j) => {
    const value = values[row * columns + j];
    return value === -32768 ? -Infinity : value * scales[row];
  };
}

// A layer of another stack may have fewer heads than the chosen one's.
const headsOf = (layer, head) => (head < 0 || head >= layer.heads ? [...Array(layer.heads).keys()] : [head]);
const maskHead = (layer, head) => (layer.maskHeads === 1 ? 0 : head);

// The row of one query: mask, attention under it and without it, and their difference, each a number for every key.
// A layer without a mask (its op is null) has queries and keys of its own in the model with neutral masks.
function rowsOf(layer, head, query) {
  const heads = headsOf(layer, head);
  const [q, k] = [layer.query, layer.key].map(matrix);
  const [left, right] = layer.op === null ? [] : [layer.left, layer.right].map(matrix);
  const [plainQ, plainK] = layer.op === null ? [layer.plainQuery, layer.plainKey].map(matrix) : [q, k];
  const found = Object.fromEntries(MAPS.map(([name]) => [name, new Float64Array(layer.keyCount)]));
  for (const h of heads) {
    const shift = bias(layer, h, query);
    const m = maskHead(layer, h);
    const masked = new Float64Array(layer.keyCount);
    const plain = new Float64Array(layer.keyCount);
    for (let j = 0; j < layer.keyCount; j++) {
      const [row, other] = [h * layer.queryCount + query, h * layer.keyCount + j];
      const value = left ? dot(left, m * layer.queryCount + query, right, m * layer.keyCount + j) : NaN;
      const score = dot(q, row, k, other);
      found.mask[j] += value / heads.length;
      plain[j] = (left ? score : dot(plainQ, row, plainK, other)) + shift(j);
      masked[j] = (layer.op === "mul" ? score * value : layer.op === "add" ? score + value : score) + shift(j);
    }
    softmax(masked).forEach((value, j) => (found.masked[j] += value / heads.length));
    softmax(plain).forEach((value, j) => (found.plain[j] += value / heads.length));
  }
  found.difference = found.masked.map((value, j) => value - found.plain[j]);
  return found;
}

// The mean of the mask over the queries, a number for every key; of the attention in a layer without a mask.
const importances = new Map();
function importanceOf(index, head) {
  const layer = page.layers[index];
  const heads = [...new Set(headsOf(layer, head).map((h) => maskHead(layer, h)))];
  const name = `${index} ${heads}`;
  if (!importances.has(name)) importances.set(name, layer.op === null ? meanAttention(layer, head) : meanMask(layer, heads));
  return importances.get(name);
}

function meanAttention(layer, head) {
  const found = new Float64Array(layer.keyCount);
  for (let query = 0; query < layer.queryCount; query++)
    rowsOf(layer, head, query).masked.forEach((value, j) => (found[j] += value / layer.queryCount));
  return found;
}

function meanMask(layer, heads) {
  const [left, right] = [matrix(layer.left), matrix(layer.right)];
  const found = new Float64Array(layer.keyCount);
  for (const h of heads) {
    const mean = new Float64Array(left.columns);
    for (let row = h * layer.queryCount; row < (h + 1) * layer.queryCount; row++)
      for (let c = 0; c < left.columns; c++) mean[c] += left.values[row * left.columns + c] * left.scales[row];
    for (let j = 0, row = h * layer.keyCount; j < layer.keyCount; j++, row++) {
      let sum = 0;
      for (let c = 0; c < left.columns; c++) sum += mean[c] * right.values[row * left.columns + c];
      found[j] += (sum * right.scales[row]) / layer.queryCount / heads.length;
    }
  }
  return found;
}

// Tokens. A layer with merged or pruned tokens has a list of places: of each token, the row that it is part of, or -1.

const place = (places, token) => (places === null ? token : places[token]);
const spread = (values, places) => (places === null ? values : Float64Array.from(places, (p) => (p < 0 ? NaN : values[p])));

// The token in the middle of the longest run.
function middleOf(sequence) {
  const sizes = sequence.map((run) => page.runs[run].size);
  const at = sizes.indexOf(Math.max(...sizes));
  const [rows, columns] = page.runs[sequence[at]].grid ?? [1, sizes[at]];
  return sizes.slice(0, at).reduce((a, b) => a + b, 0) + Math.min(Math.floor(rows / 2) * columns + Math.floor(columns / 2), sizes[at] - 1);
}

function runOf(sequence, token) {
  let first = 0;
  for (const run of sequence.map((index) => page.runs[index])) {
    if (token < first + run.size) return { run, at: token - first };
    first += run.size;
  }
}

function labelOf(sequence, token) {
  const { run, at } = runOf(sequence, token);
  if (run.labels) return `${run.name} ${run.labels[at]}`;
  return `${run.name}, row ${Math.floor(at / run.grid[1])}, column ${at % run.grid[1]}`;
}

function members(places, token) {
  if (places === null || places[token] < 0) return new Set([token]);
  return new Set([...places.keys()].filter((other) => places[other] === places[token]));
}
