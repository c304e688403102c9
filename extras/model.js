"use strict";
// ─── Numbers ──────────────────────────────────────────────────────────────────────────────────
function bytesFromBase64(text) {
  const characters = atob(text), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

// The page stores numbers in little-endian byte order, which is that of every current processor.
function float32FromBase64(text) {
  return new Float32Array(bytesFromBase64(text).buffer);
}

// A matrix is stored as 16-bit integers, with a scale for each of its rows (see explore.py).
function unpack({shape, float32, int16, scales}) {
  if (float32 !== undefined) return {shape, values: float32FromBase64(float32)};
  const integers = new Int16Array(bytesFromBase64(int16).buffer);
  const rowScales = float32FromBase64(scales), length = shape[1];
  const values = new Float32Array(integers.length);
  for (let i = 0; i < values.length; i++) {
    values[i] = integers[i] * rowScales[Math.floor(i / length)];
  }
  return {shape, values};
}

function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

function softmax(values, temperature = 1) {
  const highest = values[argmax(values)];
  const result = Float64Array.from(values, value => Math.exp((value - highest) / temperature));
  const sum = result.reduce((a, b) => a + b, 0);
  return result.map(value => value / sum);
}

// The indices of the `count` largest values, the largest first. (For a few, sorting takes longer.)
function largest(values, count) {
  if (count > 50) {
    const sorted = Uint32Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
    return [...sorted.subarray(0, count)];
  }
  const rest = new Float64Array(values), indices = [];
  while (indices.length < Math.min(count, values.length)) {
    indices.push(argmax(rest));
    rest[indices.at(-1)] = -Infinity;
  }
  return indices;
}

// ─── Tokenizers (steps 3 and 4) ───────────────────────────────────────────────────────────────
class WordTokenizer {
  constructor({tokens, pattern, unknown}) {
    this.tokens = tokens;
    this.ids = new Map(tokens.map((token, id) => [token, id]));
    this.unknown = this.ids.get(unknown);
    this.pattern = new RegExp(pattern, "gv");
  }
  encode(text) {
    return (text.match(this.pattern) ?? []).map(
      piece => this.ids.get(piece) ?? this.ids.get(" " + piece) ?? this.unknown);
  }
  decode(ids) {
    return ids.map(id => this.tokens[id]).join("");
  }
  bytes(id) {
    return [...new TextEncoder().encode(this.tokens[id])];
  }
}

// A token is a string of characters from U+0000 to U+00FF, one for each byte.
class BPETokenizer {
  constructor({tokens, pattern, end_of_text}) {
    this.tokens = [...tokens, end_of_text];
    this.ranks = new Map(tokens.map((token, rank) => [token, rank]));
    this.pattern = new RegExp(pattern, "gv");
    this.known = new Map();         // pieces that were encoded before
  }
  encode(text) {
    return (text.match(this.pattern) ?? []).flatMap(piece => {
      if (!this.known.has(piece)) this.known.set(piece, this.merge(piece));
      return this.known.get(piece);
    });
  }
  // Begin with single bytes, and merge the neighbours whose token has the lowest rank, again and
  // again.
  merge(piece) {
    let parts = Array.from(new TextEncoder().encode(piece), byte => String.fromCharCode(byte));
    if (this.ranks.has(parts.join(""))) parts = [parts.join("")];
    const rank = i => this.ranks.get(parts[i] + parts[i + 1]) ?? Infinity;
    const ranks = parts.slice(1).map((_, i) => rank(i));
    while (ranks.length) {
      let best = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
      if (ranks[best] === Infinity) break;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ranks.splice(best, 1);
      if (best > 0) ranks[best - 1] = rank(best - 1);
      if (best < ranks.length) ranks[best] = rank(best);
    }
    return parts.map(part => this.ranks.get(part));
  }
  decode(ids) {
    const bytes = Uint8Array.from(ids.flatMap(id => this.bytes(id)));
    return new TextDecoder("utf-8", {ignoreBOM: true}).decode(bytes);
  }
  bytes(id) {
    return Array.from(this.tokens[id], character => character.charCodeAt(0));
  }
}

// ─── Dot products ─────────────────────────────────────────────────────────────────────────────
// Nearly all the time goes into dot products. dot4(x, w, y, n) computes four of them, of the n
// numbers at address x with each of the four rows that begin at address w, and writes them to
// address y. Addresses count bytes, and n is a multiple of 4.
function dot4InJavaScript(numbers) {
  return (x, w, y, n) => {
    x /= 4; w /= 4; y /= 4;
    let a = 0, b = 0, c = 0, d = 0;
    for (let i = 0; i < n; i++) {
      const value = numbers[x + i];
      a += value * numbers[w + i];
      b += value * numbers[w + n + i];
      c += value * numbers[w + 2 * n + i];
      d += value * numbers[w + 3 * n + i];
    }
    numbers[y] = a; numbers[y + 1] = b; numbers[y + 2] = c; numbers[y + 3] = d;
  };
}

function slowDot4(size) {
  const numbers = new Float32Array(size);
  return [numbers, dot4InJavaScript(numbers)];
}

// JavaScript multiplies one pair of numbers at a time, WebAssembly four. This is the same function
// in WebAssembly, assembled here by hand; nothing else on the page needs it. Returns null where the
// browser does not know these instructions.
function fastDot4(size) {
  const GET = 0x20, SET = 0x21, TEE = 0x22, CONST = 0x41, PLUS = 0x6a;
  const LOAD = [0xfd, 0x00, 2, 0], TIMES4 = [0xfd, 0xe6, 0x01], PLUS4 = [0xfd, 0xe4, 0x01];
  const x = 0, w = 1, y = 2, n = 3, end = 4, four = 12;         // parameters and local variables
  const rows = [w, 5, 6, 7], sums = [8, 9, 10, 11];
  const lane = (sum, i) => [GET, sum, 0xfd, 0x1f, i];
  const body = [
    2, 4, 0x7f, 5, 0x7b,                                        // 4 integers, 5 times 4 floats
    GET, n, CONST, 2, 0x74, TEE, n, GET, x, PLUS, SET, end,     // n *= 4; end = x + n
    ...[1, 2, 3].flatMap(i => [GET, rows[i - 1], GET, n, PLUS, SET, rows[i]]),
    0x03, 0x40,                                                 // loop
    GET, x, ...LOAD, SET, four,
    ...[0, 1, 2, 3].flatMap(i => [                              // sum += four * (4 of the row)
      GET, sums[i], GET, four, GET, rows[i], ...LOAD, ...TIMES4, ...PLUS4, SET, sums[i],
      GET, rows[i], CONST, 16, PLUS, SET, rows[i]]),
    GET, x, CONST, 16, PLUS, TEE, x, GET, end, 0x49, 0x0d, 0, 0x0b,     // x += 16, until end
    ...[0, 1, 2, 3].flatMap(i => [                              // store the sum of the 4 sums
      GET, y, ...lane(sums[i], 0), ...lane(sums[i], 1), 0x92, ...lane(sums[i], 2), 0x92,
      ...lane(sums[i], 3), 0x92, 0x38, 2, 4 * i]),
    0x0b];
  const length = n => [n & 0x7f | 0x80, n >> 7];
  const section = (id, content) => [id, ...length(content.length), ...content];
  try {
    const module = new WebAssembly.Module(Uint8Array.of(
      0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,                          // "asm" and the version
      ...section(1, [1, 0x60, 4, 0x7f, 0x7f, 0x7f, 0x7f, 0]),   // type: four integers, no result
      ...section(2, [1, 1, 0x6d, 1, 0x6d, 2, 0, 1]),            // import the memory "m" of "m"
      ...section(3, [1, 0]), ...section(7, [1, 1, 0x66, 0, 0]),         // export function 0, "f"
      ...section(10, [1, ...length(body.length), ...body])));
    const memory = new WebAssembly.Memory({initial: Math.ceil(size * 4 / 65536)});
    const {f} = new WebAssembly.Instance(module, {m: {m: memory}}).exports;
    return [new Float32Array(memory.buffer), f];
  } catch {
    return null;
  }
}

// ─── The model (step 6) ───────────────────────────────────────────────────────────────────────
// T tokens with C numbers each are one array of T * C numbers, a token after the other.
const multipleOf4 = n => Math.ceil(n / 4) * 4;

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

// erf by formula 7.1.26 of Abramowitz and Stegun, whose error is below 0.00000015
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const polynomial = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t
                      + 0.254829592) * t;
  const result = 1 - polynomial * Math.exp(-x * x);
  return x < 0 ? -result : result;
}

const GELU = {
  exact: x => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  tanh: x => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
};

// Apply a GELU to all numbers of x, by its values at 16,385 points from -8 to 8 and straight lines
// between them. This is several times faster than the formulas and differs by less than 0.0000002.
function tabulate(gelu) {
  const table = Float64Array.from({length: 16385}, (_, i) => gelu(i / 1024 - 8));
  return x => {
    for (let i = 0; i < x.length; i++) {
      const place = (x[i] + 8) * 1024, before = Math.floor(place);
      if (before < 0) x[i] = 0;
      else if (before < 16384) {
        x[i] = table[before] + (place - before) * (table[before + 1] - table[before]);
      }
    }
  };
}

// What a model has computed for the tokens so far, so that it need not be computed again: for every
// block the queries, keys and values of its attention, and the vectors as the embedding, each
// attention and each feed-forward network leave them.
class Cache {
  constructor({n_layers, context_length, emb_dim}) {
    const arrays = n => Array.from({length: n}, () => new Float32Array(context_length * emb_dim));
    this.ids = [];
    this.queries = arrays(n_layers);
    this.keys = arrays(n_layers);
    this.values = arrays(n_layers);
    this.vectors = arrays(2 * n_layers + 1);
  }
}

class Model {
  constructor(config, packed, fast = true) {
    this.config = config;
    this.weights = Object.fromEntries(
      Object.entries(packed).map(([name, weight]) => [name, unpack(weight)]));
    if (config.tie_weights) this.weights["out_head.weight"] = this.weights["tok_emb.weight"];
    this.activate = tabulate(GELU[config.gelu]);
    this.prepareLinearLayers(fast);
  }

  // dot4 needs all numbers in one memory: the matrices, whose rows are filled up with zeros to a
  // multiple of 4 numbers, and room for the inputs and outputs of one layer.
  prepareLinearLayers(fast) {
    const names = Object.keys(this.weights).filter(
      name => this.weights[name].shape.length === 2 && !/^(tok|pos)_emb/.test(name));
    const {context_length: T, emb_dim: C, vocab_size: V} = this.config;
    let size = 0;
    const reserve = n => (size += n) - n;
    this.layers = {};
    for (const name of names) {
      const [nOut, nIn] = this.weights[name].shape;
      const layer = {nIn, nOut, rowLength: multipleOf4(nIn), nRows: multipleOf4(nOut),
                     bias: this.weights[name.replace(/weight$/, "bias")]?.values};
      layer.start = reserve(layer.rowLength * layer.nRows);
      this.layers[name.replace(/\.weight$/, "")] = layer;
    }
    this.inputs = reserve(T * multipleOf4(4 * C));
    this.outputs = reserve(multipleOf4(Math.max(T * 4 * C, V)));
    [this.numbers, this.dot4] = fast && fastDot4(size) || slowDot4(size);
    for (const name of names) {
      const {start, nIn, nOut, rowLength} = this.layers[name.replace(/\.weight$/, "")];
      for (let row = 0; row < nOut; row++) {
        const values = this.weights[name].values.subarray(row * nIn, (row + 1) * nIn);
        this.numbers.set(values, start + row * rowLength);
      }
      delete this.weights[name];
    }
  }

  // The outputs of a linear layer for the T inputs in x
  linear(name, x) {
    const {nIn, nOut, nRows, rowLength, start, bias} = this.layers[name];
    const T = x.length / nIn, y = new Float32Array(T * nOut);
    for (let t = 0; t < T; t++) {
      const input = this.inputs + t * rowLength;
      this.numbers.fill(0, input + nIn, input + rowLength);
      this.numbers.set(x.subarray(t * nIn, (t + 1) * nIn), input);
    }
    for (let row = 0; row < nRows; row += 4) {
      for (let t = 0; t < T; t++) {
        this.dot4(4 * (this.inputs + t * rowLength), 4 * (start + row * rowLength),
                  4 * (this.outputs + t * nRows + row), rowLength);
      }
    }
    for (let t = 0; t < T; t++) {
      const output = this.outputs + t * nRows;
      y.set(this.numbers.subarray(output, output + nOut), t * nOut);
      if (bias) for (let i = 0; i < nOut; i++) y[t * nOut + i] += bias[i];
    }
    return y;
  }

  norm(name, x) {
    const scale = this.weights[name + ".weight"].values, C = scale.length;
    const shift = this.weights[name + ".bias"].values, y = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += C) {
      let sum = 0, squares = 0;
      for (let i = start; i < start + C; i++) sum += x[i];
      const mean = sum / C;
      for (let i = start; i < start + C; i++) squares += (x[i] - mean) ** 2;
      const factor = 1 / Math.sqrt(squares / C + 1e-5);
      for (let i = 0; i < C; i++) {
        y[start + i] = (x[start + i] - mean) * factor * scale[i] + shift[i];
      }
    }
    return y;
  }

  embed(ids, start) {
    const C = this.config.emb_dim, x = new Float32Array(ids.length * C);
    const tokens = this.weights["tok_emb.weight"].values;
    const positions = this.weights["pos_emb.weight"].values;
    for (let t = 0; t < ids.length; t++) {
      for (let i = 0; i < C; i++) {
        x[t * C + i] = tokens[ids[t] * C + i] + positions[(start + t) * C + i];
      }
    }
    return x;
  }

  // Rotate the queries or keys in x, whose first token is at position `start`.
  rotate(x, start) {
    const {emb_dim: C, n_heads: H} = this.config, D = C / H;
    for (let t = 0; t < x.length / C; t++) {
      for (let i = 0; i < D / 2; i++) {
        const angle = (start + t) * 10000 ** (-2 * i / D), cos = Math.cos(angle),
              sin = Math.sin(angle);
        for (let first = t * C + i; first < (t + 1) * C; first += D) {
          const second = first + D / 2, a = x[first], b = x[second];
          x[first] = a * cos - b * sin;
          x[second] = a * sin + b * cos;
        }
      }
    }
  }

  // How much token t attends to the tokens 0 to t
  attentionWeights(cache, block, head, t) {
    const {emb_dim: C, n_heads: H} = this.config, D = C / H;
    const query = cache.queries[block], keys = cache.keys[block], weights = new Float32Array(t + 1);
    let highest = -Infinity, sum = 0;
    for (let s = 0; s <= t; s++) {
      let score = 0;
      const from = s * C;
      for (let i = head * D; i < (head + 1) * D; i++) score += query[t * C + i] * keys[from + i];
      weights[s] = score / Math.sqrt(D);
      if (weights[s] > highest) highest = weights[s];
    }
    for (let s = 0; s <= t; s++) sum += weights[s] = Math.exp(weights[s] - highest);
    for (let s = 0; s <= t; s++) weights[s] /= sum;
    return weights;
  }

  // The context vectors of the tokens from `start` to `end`
  contexts(cache, block, start, end) {
    const {emb_dim: C, n_heads: H} = this.config, D = C / H, values = cache.values[block];
    const y = new Float32Array((end - start) * C);
    for (let t = start; t < end; t++) {
      for (let head = 0; head < H; head++) {
        const weights = this.attentionWeights(cache, block, head, t);
        for (let s = 0; s <= t; s++) {
          const weight = weights[s], to = (t - start) * C, from = s * C;
          for (let i = head * D; i < (head + 1) * D; i++) y[to + i] += weight * values[from + i];
        }
      }
    }
    return y;
  }

  // Compute everything for a window of ids, and keep it in the cache. What the cache already has of
  // this window stays. With `lastOnly`, the last block computes the last token only, which is
  // enough to write. Returns the logits of the token after the window.
  forward(window, cache, lastOnly = false) {
    const {emb_dim: C, n_layers, position} = this.config;
    let start = 0;
    while (start < window.length - 1 && window[start] === cache.ids[start]) start++;
    cache.ids = [...window];
    let x = this.embed(window.slice(start), start);
    cache.vectors[0].set(x, start * C);
    for (let block = 0; block < n_layers; block++) {
      const name = `trf_blocks.${block}.`, normed = this.norm(name + "norm1", x);
      const first = lastOnly && block === n_layers - 1 ? window.length - 1 : start;
      const keys = this.linear(name + "att.key", normed);
      const queries = this.linear(name + "att.query", normed.subarray((first - start) * C));
      if (position === "rotary") {
        this.rotate(keys, start);
        this.rotate(queries, first);
      }
      cache.keys[block].set(keys, start * C);
      cache.queries[block].set(queries, first * C);
      cache.values[block].set(this.linear(name + "att.value", normed), start * C);
      const contexts = this.contexts(cache, block, first, window.length);
      x = x.subarray((first - start) * C);
      add(x, this.linear(name + "att.out_proj", contexts));
      cache.vectors[2 * block + 1].set(x, first * C);
      const hidden = this.linear(name + "ff.expand", this.norm(name + "norm2", x));
      this.activate(hidden);
      add(x, this.linear(name + "ff.project", hidden));
      cache.vectors[2 * block + 2].set(x, first * C);
    }
    return this.head(x.subarray(x.length - C));
  }

  head(x) {
    return this.linear("out_head", this.norm("final_norm", x));
  }
}

// ─── Writing (step 13) ────────────────────────────────────────────────────────────────────────
// The probabilities with which the next token is chosen
function nextTokenProbabilities(logits, {temperature, topK, topP}) {
  if (temperature < 1e-4) {
    const greedy = new Float64Array(logits.length);
    greedy[argmax(logits)] = 1;
    return greedy;
  }
  const probabilities = softmax(logits, temperature);
  if (!topK && topP >= 1) return probabilities;
  const kept = new Float64Array(logits.length);
  const candidates = largest(probabilities, topK || logits.length);
  const total = candidates.reduce((sum, id) => sum + probabilities[id], 0);
  let sumBefore = 0;
  for (const id of candidates) {
    if (topP < 1 && sumBefore >= topP) break;
    kept[id] = probabilities[id];
    sumBefore += probabilities[id] / total;
  }
  const sum = kept.reduce((a, b) => a + b, 0);
  return kept.map(probability => probability / sum);
}

function chooseToken(probabilities) {
  let rest = Math.random();
  for (let id = 0; id < probabilities.length; id++) {
    rest -= probabilities[id];
    if (rest < 0) return id;
  }
  return argmax(probabilities);       // rounding
}

// Yield one new token id after another, without end.
function* generate(model, ids, sampling) {
  const cache = new Cache(model.config), longest = model.config.context_length;
  let window = ids.slice(-longest);
  while (true) {
    const logits = model.forward(window, cache, true);
    const id = chooseToken(nextTokenProbabilities(logits, sampling()));
    yield id;
    window = [...window, id].slice(-longest);
  }
}

// ─── The page ─────────────────────────────────────────────────────────────────────────────────
// explore.html and lesson.html have the same parts, each as many of them as it needs. What has an
// id occurs once on a page at most; a prompt, the bars and the curves have classes instead, because
// the lesson shows them in several steps. All texts of the run are set as text, never as HTML.
const $ = id => document.getElementById(id);
const all = selector => [...document.querySelectorAll(selector)];
const inLesson = document.body.classList.contains("lesson");
const MAX_NEW_TOKENS = inLesson ? 30 : 2000;      // after a click on Continue
let run, tokenizer, model, view;        // set by `start`; `view` is the cache of what is shown
let words = null;           // the tokenizer of step 3, where the page shows it
let ids = [];               // the tokens of the prompt
let typed = "";             // the part of the prompt that was typed; the rest is generated
let nTyped = 0;             // its number of tokens
let logits = null;          // of the token after the prompt
let selected = 0;           // the index in the window of the token that was clicked
let pointed = null;         // the index of the token under the mouse, if any
let streaming = null;       // not null while the model writes
let windowLength = 4;       // in step 5; a shorter prompt has a shorter window
let evaluation = 0;         // the index of the evaluation that the curves mark

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function svgElement(tag, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

const hex = bytes => bytes.map(byte => byte.toString(16).padStart(2, "0")).join(" ");
const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
function percent(p) {
  const number = p === 0 || p >= 0.9995 ? (100 * p).toFixed(0)
    : p < 0.0005 ? "<0.1" : (100 * p).toFixed(1);
  return number + "\u00a0%";           // a space at which no line breaks
}
const shortened = name => name.length > 24 ? name.slice(0, 23) + "…" : name;
const quoted = id => `“${shortened(tokenName(id))}”`;

// The text of a token on one line; a part of a character is shown as its bytes.
function tokenName(id, source = tokenizer) {
  const name = source.decode([id]);
  if (name.includes("\ufffd") && source instanceof BPETokenizer) {
    return `<${hex(source.bytes(id))}>`;
  }
  return name.replaceAll("\n", "⏎").replaceAll(" ", "␣").replaceAll("\t", "→")
             .replace(/[\0-\x1f\x7f-\x9f\u2028\u2029]/g, "\ufffd");
}

const currentWindow = () => ids.slice(-run.config.context_length);
const offset = () => Math.max(0, ids.length - run.config.context_length);
const current = () => Math.min(pointed ?? selected, currentWindow().length - 1);

// A color between two of the style's colors: share 0 is the first, 1 the second.
function mix(first, second, share) {
  const style = getComputedStyle(document.documentElement);
  const [a, b] = [first, second].map(name => {
    const color = parseInt(style.getPropertyValue(name).trim().slice(1), 16);
    return [color >> 16, color >> 8 & 255, color & 255];
  });
  return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * share)).join()})`;
}

// 65 colors between two, to be used many times
const scale = (first, second) => Array.from({length: 65}, (_, i) => mix(first, second, i / 64));

function prepareCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

// ─── Tokens ───────────────────────────────────────────────────────────────────────────────────
// A row of buttons, one for each token. Arrow keys move from one to the next.
function showChips(box, first, make) {
  if (!box) return;
  const focused = box.contains(document.activeElement);
  box.replaceChildren(...ids.slice(first).map((id, i) => {
    const t = first + i - offset();
    const chip = make(id, t);
    chip.className += " chip" + (t < 0 ? " outside" : "");
    chip.tabIndex = t === selected ? 0 : -1;
    chip.disabled = t < 0;
    chip.setAttribute("aria-pressed", t === selected);
    chip.onclick = () => select(t);
    chip.onpointerenter = event => {
      if (event.pointerType === "mouse") point(t);
    };
    chip.onpointerleave = () => point(null);
    chip.onkeydown = event => {
      const last = currentWindow().length - 1;
      const target = {ArrowLeft: t - 1, ArrowRight: t + 1, Home: 0, End: last}[event.key];
      if (target === undefined) return;
      event.preventDefault();
      select(Math.max(0, Math.min(last, target)));
      box.querySelector("[tabindex='0']").focus();
    };
    return chip;
  }));
  if (focused) box.querySelector("[tabindex='0']")?.focus();
}

// What stands for a token beside its id
function tokenChip(tag, id, source = tokenizer) {
  const bytes = hex(source.bytes(id)), name = tokenName(id, source);
  const chip = element(tag, {title: `bytes ${bytes}`, className: `kind${id % 5}`},
                       shortened(name), element("small", {}, String(id)));
  chip.setAttribute("aria-label", `${name}, id ${id}, bytes ${bytes}`);
  return chip;
}

function showTokens() {
  const first = Math.max(0, offset() - 30);       // with some that the model does not see any more
  showChips($("chips"), first, id => tokenChip("button", id));
  if (first) $("chips")?.prepend(`… ${count(first, "token")} `);
  for (const box of [$("shades"), $("lens-chips")]) {
    showChips(box, offset(), id => element("button", {}, shortened(tokenName(id))));
  }
}

// The same text, split into words by the tokenizer of step 3
function showWords() {
  if (!words) return;
  const found = words.encode(allText()), nUnknown = found.filter(id => id === words.unknown).length;
  $("words").replaceChildren(...found.slice(-60).map(id => {
    const chip = tokenChip("li", id, words);
    chip.className = "chip " + (id === words.unknown ? "unknown" : chip.className);
    return chip;
  }));
  $("unknown").textContent = `${count(found.length, "token")}, of which ${nUnknown} `
    + `${nUnknown === 1 ? "is" : "are"} unknown. The vocabulary of the story has `
    + `${count(words.tokens.length, "entry").replace("entrys", "entries")}.`;
}

function showToken() {
  if (!$("token")) return;
  const t = current(), window = currentWindow();
  if (!window.length) {
    $("token").textContent = "The prompt is empty. Type the first words of a sentence.";
    return;
  }
  const id = window[t];
  $("token").textContent = `Token ${t + offset() + 1} of ${ids.length}: ${quoted(id)}, id ${id}, `
    + `bytes ${hex(tokenizer.bytes(id))}`
    + (offset() ? `. The model sees the last ${window.length} tokens only.` : "");
}

function select(t) {
  selected = t;
  pointed = null;
  showTokens();
  showChosen();
}

function point(t) {
  pointed = t;
  showChosen();
}

function showChosen() {
  showToken();
  showShades();
  showLens();
}

// ─── The next token ───────────────────────────────────────────────────────────────────────────
const greedy = () => ({temperature: 0, topK: 0, topP: 1});

function sampling() {
  return {temperature: Number($("temperature").value), topK: Number($("top-k").value),
          topP: Number($("top-p").value)};
}

function showNext() {
  const {temperature, topK, topP} = sampling();
  $("temperature-value").textContent = temperature ? temperature.toFixed(2) : "0 (greedy)";
  $("top-k-value").textContent = topK || "0 (all)";
  $("top-p-value").textContent = topP.toFixed(2);
  if (!logits) return all(".bars").forEach(list => list.replaceChildren());
  const probabilities = softmax(logits);
  const chosen = nextTokenProbabilities(logits, sampling());
  const likely = largest(logits, Math.min(10, logits.length));
  for (const list of all(".bars")) {
    // Before step 13, there is nothing to choose.
    const shown = list.classList.contains("softmax") ? [probabilities] : [probabilities, chosen];
    list.replaceChildren(...likely.map(id => barOf(list, id, shown.map(found => found[id]))));
  }
}

// One row of the bars: a token, its logit and its probabilities
function barOf(list, id, probabilities) {
  const bars = probabilities.map(p => {
    const bar = element("i");
    bar.style.width = `${100 * p}%`;
    return bar;
  });
  const cells = [logits[id].toFixed(2), ...probabilities.map(percent)], name = tokenName(id);
  const button = element("button", {onclick: () => append(id, list), title: "append this token"},
    element("span", {className: "bar-name"}, name), element("span", {className: "bar"}, ...bars),
    ...cells.map(cell => element("span", {}, cell)));
  button.setAttribute("aria-label", `Append ${name}: logit ${cells[0]}, probability ${cells[1]}`
                                    + (cells[2] ? `, chosen with ${cells[2]}` : ""));
  return element("li", {}, button);
}

function append(id, list) {
  stop();
  clearReadouts();
  ids.push(id);
  showText();
  refresh();
  list.querySelector("button").focus();
}

// ─── Windows and losses ───────────────────────────────────────────────────────────────────────
// The windows of step 5, cut from the tokens of the prompt: inputs, targets, and the examples that
// they hold
function showWindows() {
  if (!$("windows")) return;
  const names = currentWindow().map(id => shortened(tokenName(id)));
  const longest = Math.max(1, names.length - 1), T = Math.min(windowLength, longest);
  const lastStart = Math.max(0, names.length - 1 - T);
  const start = Math.min(Number($("window-start").value), lastStart);
  $("length").max = Math.min(longest, 12);
  $("length").value = T;
  $("window-start").max = lastStart;
  $("length-value").textContent = T;
  $("window-start-value").textContent = start;
  if (names.length < 2) return $("windows").replaceChildren(
    element("p", {}, "A window needs two tokens at least: type some more."));
  const chip = (name, i) => element("span", {className: `chip kind${i % 5}`}, name);
  const row = (title, from) => element("tr", {}, element("th", {scope: "row"}, title),
    ...names.slice(from, from + T).map((name, t) => element("td", {}, chip(name, from + t))));
  const examples = Array.from({length: T}, (_, t) => element("li", {},
    ...names.slice(start, start + t + 1).map((name, i) => chip(name, start + i)), " → ",
    chip(names[start + t + 1], start + t + 1)));
  $("windows").replaceChildren(
    element("div", {className: "scroll", tabIndex: 0},
            element("table", {}, row("input", start), row("target", start + 1))),
    element("p", {className: "quiet"}, T === 1 ? "This window holds one example:"
                                               : `This window holds ${T} examples:`),
    element("ol", {className: "examples"}, ...examples));
}

// The probability that the model gave to each token, given those before it, and its loss (step 9)
function showLosses() {
  if (!$("losses")) return;
  const window = currentWindow(), C = run.config.emb_dim, last = view.vectors.at(-1);
  const found = window.slice(1).map((id, t) => {
    const p = softmax(model.head(last.subarray(t * C, (t + 1) * C)))[id];
    return {id, p, loss: -Math.log(p)};
  });
  $("losses").closest(".scroll").hidden = !found.length;
  const uniform = Math.log(run.config.vocab_size);
  const longest = Math.max(uniform, ...found.map(({loss}) => loss));
  $("losses").replaceChildren(...found.map(({id, p, loss}) => {
    const bar = element("i");
    bar.style.width = `${100 * loss / longest}%`;
    return element("tr", {}, element("th", {scope: "row"}, tokenName(id)),
      element("td", {}, percent(p)), element("td", {className: "bar-cell"},
        element("span", {className: "bar"}, bar)), element("td", {}, loss.toFixed(2)));
  }));
  const mean = found.reduce((sum, {loss}) => sum + loss, 0) / found.length;
  const V = run.config.vocab_size.toLocaleString("en");
  $("mean-loss").textContent = found.length
    ? `The mean loss of these ${count(found.length, "token")} is ${mean.toFixed(2)}, their `
    + `perplexity ${Math.exp(mean).toFixed(1)}. A uniform guess would have ln(${V}) = `
    + `${uniform.toFixed(2)}.`
    : "The first token has no loss, because nothing before it predicts it: type some more.";
}

// ─── Attention ────────────────────────────────────────────────────────────────────────────────
const chosenBlock = () => $("block").selectedIndex;
const chosenHead = () => $("head").selectedIndex;

// The exponent makes small weights more visible.
function attentionColors() {
  const colors = scale("--page", "--accent");
  return weight => colors[Math.round(64 * weight ** 0.7)];
}

function showShades() {
  const chips = $("shades").children, t = current();
  if (!chips.length) return $("weight").textContent = "";
  const weights = model.attentionWeights(view, chosenBlock(), chosenHead(), t);
  const colors = attentionColors(), window = currentWindow();
  for (let s = 0; s < chips.length; s++) {
    const weight = weights[s] ?? 0;
    chips[s].style.backgroundColor = colors(weight);
    chips[s].style.color = weight > 0.55 ? "var(--on-accent)" : "";
    chips[s].style.opacity = s > t ? 0.35 : 1;
    chips[s].title = s > t ? "a later token" : `weight ${weight.toFixed(3)}`;
    chips[s].setAttribute("aria-label", `${tokenName(window[s])}, ${chips[s].title}`);
  }
  const best = largest(weights, 3).map(s => `${quoted(window[s])} ${weights[s].toFixed(2)}`);
  $("weight").textContent = `${quoted(window[t])} attends most to ${best.join(", ")}`;
}

let cell = 0, labels = 0;       // pixels of the map: the side of a cell, the width of the names

function showMap() {
  const window = currentWindow(), T = window.length, canvas = $("map");
  const width = Math.min(canvas.parentElement.clientWidth - 40, 640);
  const names = window.map(id => shortened(tokenName(id)));
  labels = Math.min(120, Math.max(0, ...names.map(name => 7.5 * name.length)) + 10);
  cell = Math.min(32, (width - labels) / Math.max(T, 1));
  if (cell < 12) [labels, cell] = [0, Math.min(32, width / Math.max(T, 1))];
  const side = T * cell;
  canvas.style.width = `${labels + side}px`;
  canvas.style.height = `${labels + side}px`;
  const context = prepareCanvas(canvas, labels + side, labels + side);
  const colors = attentionColors();
  for (let t = 0; t < T; t++) {
    const weights = model.attentionWeights(view, chosenBlock(), chosenHead(), t);
    for (let s = 0; s <= t; s++) {
      const gap = cell > 8 ? 1 : 0;
      context.fillStyle = colors(weights[s]);
      context.fillRect(labels + s * cell, t * cell, cell - gap, cell - gap);
    }
  }
  if (labels) {
    context.fillStyle = mix("--quiet", "--quiet", 0);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    names.forEach((name, t) => context.fillText(name, labels - 6, (t + 0.5) * cell, labels - 8));
    context.rotate(-Math.PI / 2);
    names.forEach((name, s) => context.fillText(name, -side - 6, labels + (s + 0.5) * cell,
                                                labels - 8));
  }
  canvas.setAttribute("aria-label", `Attention weights of block ${chosenBlock() + 1}, head `
    + `${chosenHead() + 1}, for ${count(T, "token")}. The buttons above give the numbers.`);
}

function pointInMap(event) {
  const s = Math.floor((event.offsetX - labels) / cell), t = Math.floor(event.offsetY / cell);
  const window = currentWindow();
  if (s < 0 || s > t || t >= window.length) return point(null);
  point(t);
  const weight = model.attentionWeights(view, chosenBlock(), chosenHead(), t)[s];
  $("weight").textContent = `${quoted(window[t])} attends to ${quoted(window[s])} with a weight of `
    + weight.toFixed(3);
}

// ─── The way through the model ────────────────────────────────────────────────────────────────
function showLens() {
  const window = currentWindow(), t = current(), C = run.config.emb_dim;
  if (!window.length) {
    $("lens").replaceChildren();
    return $("lens-token").textContent = "";
  }
  $("lens-token").textContent = `The vector of token ${t + offset() + 1}, ${quoted(window[t])}, `
    + `has ${count(C, "number")}.`;
  const vectors = view.vectors.map(all => all.subarray(t * C, (t + 1) * C));
  const largestNumber = Math.max(...vectors.map(vector => Math.max(...vector.map(Math.abs))));
  const positive = scale("--page", "--accent"), negative = scale("--page", "--warm");
  const cells = vectors.flatMap((vector, i) => {
    const place = !i ? "at first" : `after ${i % 2 ? "attention" : "feed-forward"} ${(i + 1) >> 1}`;
    const norm = Math.hypot(...vector), probabilities = softmax(model.head(vector));
    const canvas = element("canvas"), context = prepareCanvas(canvas, C, 1);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `The vector ${place}, as a strip of colors`);
    vector.forEach((number, i) => {
      const share = Math.min(1, Math.sqrt(Math.abs(number) / largestNumber));
      context.fillStyle = (number > 0 ? positive : negative)[Math.round(64 * share)];
      context.fillRect(i, 0, 1, 1);
    });
    const says = largest(probabilities, 2).map(id => `${quoted(id)} ${percent(probabilities[id])}`);
    return [element("span", {}, place), element("b", {}, norm.toFixed(1)), canvas,
            element("span", {className: "says"}, says.join(", "))];
  });
  $("lens").replaceChildren(...["", "norm", "the vector", "prediction"].map(
    name => element(name === "norm" ? "b" : "span", {className: "head"}, name)), ...cells);
}

// ─── How it learned ───────────────────────────────────────────────────────────────────────────
const CURVES = [["train_loss", "training loss", "var(--accent)", ""],
                ["val_loss", "validation loss", "var(--warm)", "6 4"],
                ["recall", "recall", "var(--accent)", ""]];

function showHistory() {
  for (const box of all(".history")) showCurves(box);
}

function showCurves(box) {
  const history = run.history, svg = box.querySelector(".chart"), chosen = evaluation;
  const width = Math.max(260, svg.parentElement.clientWidth), left = 44, right = width - 12;
  const losses = history.flatMap(({train_loss, val_loss}) => [train_loss, val_loss ?? 0]);
  const highest = Math.ceil(Math.max(...losses, Math.log(run.config.vocab_size)));
  const lastEpoch = history.at(-1).epoch || 1;
  const x = epoch => left + (right - left) * epoch / lastEpoch;
  const yLoss = loss => 190 - 165 * loss / highest, yRecall = recall => 275 - 55 * recall;
  const parts = [];
  const line = (x1, y1, x2, y2, dash = "", color = "var(--line)") => parts.push(svgElement("line",
    {x1, y1, x2, y2, stroke: color, "stroke-dasharray": dash}));
  const text = (x, y, content, anchor = "start") => parts.push(svgElement("text",
    {x, y, "text-anchor": anchor}, content));
  for (let loss = 0; loss <= highest; loss += Math.ceil(highest / 5)) {
    line(left, yLoss(loss), right, yLoss(loss));
    text(left - 8, yLoss(loss) + 4, loss, "end");
  }
  for (const recall of [0, 1]) {
    line(left, yRecall(recall), right, yRecall(recall));
    text(left - 8, yRecall(recall) + 4, `${100 * recall} %`, "end");
  }
  for (let i = 0; i <= 4; i++) {
    const epoch = lastEpoch * i / 4;
    text(x(epoch), 295, Number(epoch.toFixed(1)), i === 4 ? "end" : "middle");
  }
  text(right, 312, "epochs", "end");
  line(left, yLoss(Math.log(run.config.vocab_size)), right, yLoss(Math.log(run.config.vocab_size)),
       "2 4", "var(--quiet)");
  line(x(history[chosen].epoch), 20, x(history[chosen].epoch), 280, "", "var(--quiet)");
  let legend = left;
  for (const [name, title, color, dash] of CURVES) {
    const points = history.filter(evaluation => evaluation[name] !== null).map(
      evaluation => [x(evaluation.epoch), (name === "recall" ? yRecall : yLoss)(evaluation[name])]);
    if (!points.length) continue;           // never measured
    parts.push(svgElement("polyline", {points: points.join(" "), fill: "none", stroke: color,
                                       "stroke-width": 2, "stroke-dasharray": dash}));
    for (const [cx, cy] of points) {
      const r = cx === x(history[chosen].epoch) ? 5 : 2.5;
      parts.push(svgElement("circle", {cx, cy, r, fill: color}));
    }
    if (name === "recall") text(left, 211, title);
    else {
      line(legend, 10, legend + 22, 10, dash, color);
      text(legend + 28, 14, title);
      legend += 45 + 7 * title.length;
    }
  }
  if (legend + 80 < width) {
    line(legend, 10, legend + 22, 10, "2 4", "var(--quiet)");
    text(legend + 28, 14, "uniform guess");
  }
  svg.setAttribute("viewBox", `0 0 ${width} 318`);
  svg.replaceChildren(...parts);
  svg.onpointermove = svg.onpointerdown = event => {
    const position = event.clientX - svg.getBoundingClientRect().left;
    const distances = history.map(({epoch}) => -Math.abs(x(epoch) - position));
    evaluation = argmax(distances);
    showHistory();
  };
  const {step, epoch, train_loss, val_loss, recall, prompt, sample} = history[chosen];
  box.querySelector(".measured").textContent = `Step ${step}, epoch ${epoch.toFixed(1)}: training `
    + `loss ${train_loss.toFixed(3)}, validation loss ${val_loss?.toFixed(3) ?? "not measured"}, `
    + `recall ${recall === null ? "not measured" : percent(recall)}. It wrote:`;
  box.querySelector(".sample").replaceChildren(element("b", {}, prompt), sample);
  const slider = box.querySelector(".evaluation");
  slider.value = chosen;
  slider.setAttribute("aria-valuetext", `evaluation at step ${step}`);
}

// ─── Changes ──────────────────────────────────────────────────────────────────────────────────
function allText() {
  const written = tokenizer.decode(ids.slice(nTyped));
  return typed + (typed.endsWith(" ") ? written.replace(/^ /, "") : written);
}

function showText() {
  for (const box of all(".prompt")) {
    box.value = allText();
    box.scrollTop = box.scrollHeight;
  }
}

// How much was written belongs to the text that is shown.
function clearReadouts() {
  for (const box of all(".speed")) box.textContent = "";
}

function setPrompt(text) {
  stop();
  clearReadouts();
  typed = text;
  ids = tokenizer.encode(text.replace(/ +$/, "") || text);    // a space belongs to the next word
  nTyped = ids.length;
  for (const box of all(".prompt")) if (box.value !== text) box.value = text;
  refresh();
}

// Compute and show everything that depends on the prompt.
function refresh() {
  const window = currentWindow();
  logits = window.length ? model.forward(window, view) : null;
  selected = Math.max(0, window.length - 1);
  pointed = null;
  for (const button of all(".continue")) button.disabled = Boolean(streaming) || !window.length;
  showTokens();
  showWords();
  showWindows();
  showLosses();
  showNext();
  showMap();
  showChosen();
}

// Write in portions of some milliseconds, so that the page stays responsive.
async function continueWriting(button) {
  const row = button.closest(".write"), stopper = row.querySelector(".stop");
  const choose = row.classList.contains("greedy") ? greedy : sampling;
  const writer = generate(model, ids, choose), start = performance.now();
  let written = 0, shown = start, elapsed = 0, ended = false;
  const report = () => row.querySelector(".speed").textContent = `${count(written, "token")} `
    + `written, ${Math.round(1000 * written / Math.max(elapsed, 1))} per second`;
  const mine = streaming = {stopper, button, report};       // stop() and a later call replace it
  clearReadouts();
  for (const other of all(".stop")) other.disabled = false;
  for (const other of all(".continue")) other.disabled = true;
  stopper.focus();
  while (streaming === mine && written < MAX_NEW_TOKENS && !ended) {
    const pause = performance.now() + 25;
    while (performance.now() < pause && written < MAX_NEW_TOKENS && !ended) {
      const id = writer.next().value;
      ended = id === run.tokenizer.end_id;
      if (!ended) ids.push(id);
      written++;
    }
    elapsed = performance.now() - start;
    showText();
    if (performance.now() - shown > 400) {
      refresh();
      shown = performance.now();
    }
    await new Promise(resolve => setTimeout(resolve));
  }
  if (streaming === mine) stop();
}

function stop() {
  if (!streaming) return;
  const {stopper, button, report} = streaming;
  streaming = null;
  report();
  refresh();
  if (document.activeElement === stopper) button.focus();
  for (const other of all(".stop")) other.disabled = true;
}

// ─── The beginning ────────────────────────────────────────────────────────────────────────────
// A page whose script computes something else than the model in Python says so and shows nothing
// else of it. Python had the same rounded weights, so only the rounding of the arithmetic differs.
// For every position of a full window, the page knows some logits from all over the vocabulary.
function computesTheSame() {
  const {window, ids, logits} = run.check, expected = float32FromBase64(logits);
  const cache = new Cache(run.config), C = run.config.emb_dim;
  model.forward(window, cache);
  const allowed = 0.001 * (1 + Math.max(...expected.map(Math.abs)));
  return window.every((_, t) => {
    const found = model.head(cache.vectors.at(-1).subarray(t * C, (t + 1) * C));
    return ids.every((id, i) => Math.abs(found[id] - expected[t * ids.length + i]) < allowed);
  });
}

function warn(message) {
  document.body.classList.add("without-model");
  $("warning").hidden = false;
  $("warning").textContent = message;
}

function describeRun() {
  const story = run.text_name && ` on ${run.text_name}`;
  if ($("title")) $("title").textContent = document.title = `Inside ${run.name}`;
  const trained = `${count(run.parameters, "parameter")}, trained for ${count(run.step, "step")}`
    + story;
  $("subtitle").textContent = $("title") ? `${trained}. The model runs in this page.`
    : `This page has a trained model inside, which runs in your browser: ${run.name}, with `
    + `${trained}. What it computes is shown in the parts marked “your model”.`;
  $("beginnings-box").hidden = !run.beginnings.length;
  $("beginnings").replaceChildren(element("option", {value: ""}, "choose …"),
    ...run.beginnings.map(text => element("option", {value: text}, text)));
  for (const [id, n] of [["block", run.config.n_layers], ["head", run.config.n_heads]]) {
    const options = Array.from({length: n}, (_, i) => element("option", {}, `${id} ${i + 1}`));
    $(id).replaceChildren(...options);
    $(id).selectedIndex = n - 1;
  }
  if (inLesson) {           // its text is about head 3 of block 1
    $("block").selectedIndex = 0;
    $("head").selectedIndex = Math.min(2, run.config.n_heads - 1);
  }
  $("top-k").max = Math.min(50, run.config.vocab_size);
  $("settings").replaceChildren(...run.settings.flatMap(([name, value, meaning]) => [
    element("dt", {}, name), element("dd", {}, String(value), element("span", {}, meaning))]));
  evaluation = Math.max(0, run.history.length - 1);
  for (const box of all(".history")) box.hidden = !run.history.length;
  for (const slider of all(".evaluation")) slider.max = evaluation;
  for (const text of all(".learned")) {
    text.textContent = run.history.length ? "The training loss falls as the model memorizes the "
      + "story. The validation loss is measured on a part that it never trains on. Recall is the "
      + "share of sentences that it continues word for word from their first five words."
      : "This file contains no history, because the model was not trained here.";
  }
}

function listen() {
  for (const box of all(".prompt")) {
    box.onfocus = stop;
    box.oninput = () => setPrompt(box.value);
    box.onkeydown = event => {
      const button = box.closest(".live").querySelector(".continue");
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) button?.click();
    };
  }
  document.onkeydown = event => {           // (a handler that returns false would swallow the key)
    if (event.key === "Escape") stop();
  };
  $("beginnings").onchange = () => {
    if ($("beginnings").value) setPrompt($("beginnings").value);
  };
  for (const button of all(".continue")) button.onclick = () => continueWriting(button);
  for (const button of all(".stop")) button.onclick = stop;
  for (const id of ["temperature", "top-k", "top-p"]) $(id).oninput = showNext;
  for (const id of ["block", "head"]) $(id).onchange = () => (showMap(), showShades());
  if ($("windows")) {
    $("window-start").oninput = showWindows;
    $("length").oninput = () => {
      windowLength = Number($("length").value);
      showWindows();
    };
  }
  $("map").onpointermove = $("map").onpointerdown = pointInMap;
  $("map").onpointerleave = () => point(null);
  for (const slider of all(".evaluation")) {
    slider.oninput = () => {
      evaluation = Number(slider.value);
      showHistory();
    };
  }
  const draw = () => {
    showMap();
    showChosen();
    if (run.history.length) showHistory();
  };
  window.onresize = draw;
  matchMedia("(prefers-color-scheme: dark)").onchange = draw;
  draw();
}

function start() {
  try {
    new RegExp("[\\p{L}--[a]]", "v");
  } catch {
    return warn("To run the model, this page needs a newer browser: Chrome 112, Firefox 116, "
                + "Safari 17, or later.");
  }
  run = JSON.parse($("data").textContent);
  tokenizer = new (run.tokenizer.kind === "word" ? WordTokenizer : BPETokenizer)(run.tokenizer);
  if (run.words && $("words")) words = new WordTokenizer(run.words);
  model = new Model(run.config, run.weights);
  view = new Cache(run.config);
  if (!computesTheSame()) {
    return warn("Warning: this page does not compute what the model computes in Python, perhaps "
                + "because story_llm.py was changed. So it shows nothing of your model.");
  }
  describeRun();
  setPrompt(run.prompt);
  const his = currentWindow().findIndex(id => tokenName(id).replace("␣", "") === "his");
  if (inLesson && his >= 0) select(his);        // its text follows this token
  listen();
}

// Show the page, then load the model.
if ($("data")) {
  requestAnimationFrame(() => setTimeout(() => {
    try {
      start();
    } catch (error) {
      warn(`Warning: this page could not run the model (${error.message}).`);
      throw error;
    }
    document.body.classList.add("ready");
  }));
}
