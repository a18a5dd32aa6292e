// Second part of the explorer page's script, after numbers.js: colours, views of tokens, and the page itself.

// Colours: RdBu (ColorBrewer), on dark pages berlin (Crameri), and cividis (Nuñez et al.), for all kinds of sight.

const ramp = (stops) => stops.split(" ").map((stop) => [0, 2, 4].map((at) => parseInt(stop.slice(at, at + 2), 16)));
const LIGHT = ramp("053061 2065ab 4393c3 90c4dd d1e5f0 f7f6f6 fddbc7 f3a481 d6604d b1182b 67001f");
const DARK = ramp("9eb0ff 62a6e0 3280a6 20526a 112732 190c09 371000 61200b 964a36 ca7b71 ffadad");
const SEQUENTIAL = ramp("00224e 083370 35456c 4f576c 666970 7d7c78 948e77 aea371 c8b866 e5cf52 fee838");
const dark = matchMedia("(prefers-color-scheme: dark)");

function colour(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const [low, part] = [Math.min(Math.floor(at), stops.length - 2), at - Math.min(Math.floor(at), stops.length - 2)];
  return stops[low].map((value, c) => Math.round(value + part * (stops[low + 1][c] - value)));
}

const css = (stops, share) => `rgb(${colour(stops, share).join(" ")})`;

// The largest distance from a value but for the outermost two percent, which may saturate, at least `least`.
function furthest(values, from, least) {
  const distances = values.filter(Number.isFinite).map((value) => Math.abs(value - from)).sort();
  return Math.max(distances[Math.floor(0.98 * (distances.length - 1))] ?? 0, least);
}

function diverging(neutral, half) {
  const stops = dark.matches ? DARK : LIGHT;
  return { stops, low: neutral - half, high: neutral + half, middle: neutral };
}

function scaleOf(name, layer, values) {
  if (name === "mask") return diverging(layer.neutral, furthest(values.mask, layer.neutral, 0.05));
  if (name === "difference") return diverging(0, furthest(values.difference, 0, 1e-6));
  const high = Math.max(furthest(values.masked, 0, 1e-6), furthest(values.plain, 0, 1e-6));
  return { stops: SEQUENTIAL, low: 0, high, middle: high / 2 };
}

// A view of a sequence of tokens: patches on their picture, others as words, or as cells in a row.

class View {
  constructor(root, sequence, small, point) {
    this.root = root;
    this.parts = [];
    let first = 0;
    root.replaceChildren();
    for (const run of sequence.map((index) => page.runs[index])) {
      const words = !run.grid && !run.time && !small;
      const kind = words ? "words" : run.grid ? "grid" : run.picture && !small ? "strip film" : "strip";
      const part = { run, first, box: element(words ? "div" : "canvas", { className: kind }) };
      if (run.grid) part.box.style.aspectRatio = `${run.grid[1] * run.shape[1]} / ${run.grid[0] * run.shape[0]}`;
      if (run.picture && !small) part.picture = pictureOf(run);
      if (words) part.box.append(...run.labels.map((label) => element("span", { textContent: label })));
      if (!small) root.append(element("p", { className: "run", textContent: run.name }));
      root.append(part.box);
      if (run.time && !run.grid && !small) {
        const ends = [run.labels[0], run.labels[run.size - 1]];
        root.append(element("p", { className: "ends" }, ...ends.map((text) => element("span", { textContent: text }))));
      }
      this.parts.push(part);
      first += run.size;
    }
    this.length = first;
    // Handlers and not listeners, because a view with other tokens takes the place of this one.
    root.onpointermove = (event) => this.tell(event, point, false);
    root.onclick = (event) => this.tell(event, point, true);
  }

  tell(event, point, isClick) {
    const part = this.parts.find(({ box }) => box.contains(event.target));
    if (!part) return;
    if (part.box.nodeName === "DIV") {
      const at = Array.prototype.indexOf.call(part.box.children, event.target);
      if (at >= 0) point(part.first + at, isClick);
      return;
    }
    const [rows, columns] = part.run.grid ?? [1, part.run.size];
    const { left, top, width, height } = part.box.getBoundingClientRect();
    const cell = (from, size, count) => Math.min(Math.max(Math.floor((from / size) * count), 0), count - 1);
    const at = cell(event.clientY - top, height, rows) * columns + cell(event.clientX - left, width, columns);
    if (at < part.run.size) point(part.first + at, isClick); // the last row of a sheet of frames may have room left
  }

  // Moves from a token by an arrow key; up and down move to the next row, in a sequence of words to the next part.
  move(token, key) {
    const part = this.parts.find(({ first, run }) => token < first + run.size);
    const step = part.run.grid?.[1] ?? (key === "ArrowUp" ? token - part.first + 1 : part.first + part.run.size - token);
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -step, ArrowDown: step, Home: -token, End: this.length - 1 - token };
    return key in moves ? Math.min(Math.max(token + moves[key], 0), this.length - 1) : null;
  }

  paint({ values, scale, places, chosen, other }) {
    for (const part of this.parts) {
      if (part.box.nodeName === "DIV") this.paintWords(part, values, scale, places, chosen, other);
      else this.paintCells(part, values, scale, places, chosen, other);
    }
  }

  paintWords({ box, first }, values, scale, places, chosen, other) {
    [...box.children].forEach((span, at) => {
      const value = values?.[first + at] ?? NaN;
      const shown = Number.isFinite(value) ? colour(scale.stops, share(scale, value)) : null;
      span.style.background = shown ? `rgb(${shown.join(" ")})` : "";
      span.style.color = shown ? (shown[0] * 0.3 + shown[1] * 0.59 + shown[2] * 0.11 > 140 ? "#000" : "#fff") : "";
      span.classList.toggle("gone", places !== null && places[first + at] < 0);
      span.classList.toggle("chosen", chosen.has(first + at));
      span.classList.toggle("other", other === first + at);
    });
  }

  paintCells({ box, run, first, picture }, values, scale, places, chosen, other) {
    const [rows, columns] = run.grid ?? [1, run.size];
    const [width, height] = [box.clientWidth, box.clientHeight].map((size) => Math.round(size * devicePixelRatio));
    if (box.width !== width || box.height !== height) [box.width, box.height] = [width, height];
    const pen = box.getContext("2d");
    const [x, y] = [(column) => Math.round((column * width) / columns), (row) => Math.round((row * height) / rows)];
    const overlaid = picture?.complete && (state.photo || !values);
    pen.clearRect(0, 0, width, height);
    if (overlaid && run.sheet && !run.grid) film(pen, run, picture, width, height);
    else if (overlaid) pen.drawImage(picture, 0, 0, width, height);
    if (overlaid && values) {
      pen.globalCompositeOperation = "saturation";
      pen.fillStyle = "#808080";
      pen.fillRect(0, 0, width, height);
      pen.globalCompositeOperation = "source-over";
    }
    for (let at = 0; at < run.size; at++) {
      const [r, c, value] = [Math.floor(at / columns), at % columns, values?.[first + at] ?? NaN];
      const box = [x(c), y(r), x(c + 1) - x(c), y(r + 1) - y(r)];
      const gone = places !== null && places[first + at] < 0;
      pen.globalAlpha = overlaid ? (gone ? 0.85 : 0.7) : 1;
      pen.fillStyle = Number.isFinite(value) ? css(scale.stops, share(scale, value)) : gone ? "#777" : picture ? "#0000" : "#9994";
      pen.fillRect(...box);
      pen.globalAlpha = 1;
      if (gone) stroke(pen, [[box[0], box[1], box[0] + box[2], box[1] + box[3]]], ["#fff"], 1);
    }
    if (run.size < rows * columns) pen.clearRect(x(run.size % columns), y(rows - 1), width, height);
    // The sides of cells beside which another kind of token is.
    const sides = (differ) => {
      const lines = [];
      for (let at = 0; at < run.size; at++) {
        for (const [down, right, ...ends] of SIDES) {
          const [r, c] = [Math.floor(at / columns), at % columns];
          const next = at + down * columns + right;
          const isInside = r + down >= 0 && next < run.size && c + right >= 0 && c + right < columns;
          const beside = isInside ? first + next : null;
          if (differ(first + at, beside)) lines.push(ends.map((end, i) => (i % 2 ? y(r + end) : x(c + end))));
        }
      }
      return lines;
    };
    if (run.frames === run.size) stroke(pen, sides(() => true), ["#fff"], 1);
    if (places !== null) stroke(pen, sides((a, b) => b !== null && places[a] !== places[b]), ["#0006", "#fff8"], 0.5);
    stroke(pen, sides((a, b) => chosen.has(a) && !chosen.has(b)), ["#000", "#ffd60a"], 2);
    if (other !== null) stroke(pen, sides((a, b) => a === other && b !== other), ["#000", "#fff"], 1.5);
  }
}

// Of a cell: the row and column beyond a side, and the ends of the side, column and row each.
const SIDES = [[-1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 1, 1], [0, -1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 1]];
const share = (scale, value) => (value - scale.low) / (scale.high - scale.low);

function stroke(pen, lines, colours, width) {
  colours.forEach((colour, index) => {
    pen.strokeStyle = colour;
    pen.lineWidth = width * devicePixelRatio * (index === 0 && colours.length > 1 ? 2.2 : 1);
    pen.beginPath();
    lines.forEach(([x, y, toX, toY]) => (pen.moveTo(x, y), pen.lineTo(toX, toY)));
    pen.stroke();
  });
}

const pictures = new Map();
function pictureOf(run) {
  if (!pictures.has(run)) {
    const picture = new Image();
    picture.onload = () => draw();
    picture.src = run.picture;
    pictures.set(run, picture);
  }
  return pictures.get(run);
}

// The page: a view to choose the query in, a map for each kind of number, and a picture of the importance in each layer.

const views = {};
const thumbs = [];
const number = (value) => (Number.isFinite(value) ? (value === 0 ? "0" : Number(value.toPrecision(4)).toString()) : "–");
const sequenceOf = (layer, side) => page.sequences[layer[side]];

function choose(changes) {
  const before = page.layers[state.layer];
  Object.assign(state, changes);
  const layer = page.layers[state.layer];
  if (!views.query || before.queries !== layer.queries || before.keys !== layer.keys) build(layer);
  if (before.heads !== layer.heads || !$("head").options.length) fillHeads(layer);
  draw();
}

function build(layer) {
  views.query = new View($("picker"), sequenceOf(layer, "queries"), false, (token, isClick) => {
    if (isClick) choose({ query: token, pinned: !(state.pinned && token === state.query) });
    else if (!state.pinned) choose({ query: token });
  });
  for (const [name] of MAPS) views[name] = new View($(name), sequenceOf(layer, "keys"), false, (token) => choose({ key: token }));
  state.query = Math.min(state.query, views.query.length - 1);
  state.key = Math.min(state.key, views.mask.length - 1);
}

function fillHeads(layer) {
  const names = ["mean over all heads", ...[...Array(layer.heads).keys()].map((head) => `head ${head}`)];
  $("head").replaceChildren(...names.map((name, index) => element("option", { value: index - 1, textContent: name })));
  if (state.head >= layer.heads) state.head = -1;
}

function draw() {
  const layer = page.layers[state.layer];
  const [queries, keys] = [sequenceOf(layer, "queries"), sequenceOf(layer, "keys")];
  const query = place(layer.queryPlaces, state.query);
  const [chosen, same] = [members(layer.queryPlaces, state.query), layer.queries === layer.keys];
  const rows = query < 0 ? null : rowsOf(layer, state.head, query);
  $("layer").value = state.layer;
  $("head").value = state.head;
  views.query.paint({ values: null, places: layer.queryPlaces, chosen, other: null });
  for (const [name] of MAPS) {
    const key = place(layer.keyPlaces, state.key);
    $(`n-${name}`).textContent = number(rows && key >= 0 ? rows[name][key] : NaN);
    $(name).parentElement.hidden = name === "mask" && layer.op === null;
    if ($(name).parentElement.hidden) continue;
    const scale = rows && scaleOf(name, layer, rows);
    const values = rows && spread(rows[name], layer.keyPlaces);
    views[name].paint({ values, scale, places: layer.keyPlaces, chosen: same ? chosen : new Set(), other: state.key });
    const bar = $(name).nextElementSibling;
    bar.style.visibility = rows ? "" : "hidden";
    if (!rows) continue;
    bar.firstElementChild.style.background = `linear-gradient(90deg, ${scale.stops.map((_, i) => css(scale.stops, i / 10)).join(",")})`;
    const ends = [values.some((value) => value < scale.low) ? "≤ " : "", "", values.some((value) => value > scale.high) ? "≥ " : ""];
    const marks = [scale.low, scale.middle, scale.high].map((value, at) => ends[at] + Number(value.toPrecision(3)));
    bar.lastElementChild.replaceChildren(...marks.map((text) => element("span", { textContent: text })));
  }
  preview($("i-frame"), queries, state.query);
  preview($("j-frame"), keys, state.key);
  $("i").textContent = labelOf(queries, state.query) + fate(layer.queryPlaces, chosen, query, "no query of this layer");
  const [group, at] = [members(layer.keyPlaces, state.key), place(layer.keyPlaces, state.key)];
  $("j").textContent = labelOf(keys, state.key) + fate(layer.keyPlaces, group, at, "gone");
  $("pin").textContent = state.pinned ? "held; Esc or a second click lets it go" : "a click holds it";
  drawThumbs(layer);
}

// Where a frame is in the sheet of a run: left, top, width and height.
function placeOf(run, picture, frame) {
  const [rows, columns] = run.sheet;
  const [width, height] = [picture.naturalWidth / columns, picture.naturalHeight / rows];
  return [(frame % columns) * width, Math.floor(frame / columns) * height, width, height];
}

// As many frames side by side as there is room for, each in the middle of its time.
function film(pen, run, picture, width, height) {
  const [, , across, down] = placeOf(run, picture, 0);
  const count = Math.min(run.frames, Math.max(1, Math.round((width * down) / (height * across))));
  for (let slot = 0; slot < count; slot++) {
    const from = placeOf(run, picture, Math.floor(((slot + 0.5) / count) * run.frames));
    pen.drawImage(picture, ...from, (slot * width) / count, 0, width / count, height);
  }
}

// The frame of a token in time.
function preview(canvas, sequence, token) {
  const { run, at } = runOf(sequence, token);
  const picture = run.sheet && pictureOf(run);
  canvas.hidden = !picture?.complete;
  if (canvas.hidden) return;
  const from = placeOf(run, picture, Math.floor((at * run.frames) / run.size));
  [canvas.width, canvas.height] = from.slice(2);
  canvas.getContext("2d").drawImage(picture, ...from, 0, 0, canvas.width, canvas.height);
}

function fate(places, group, at, gone) {
  if (at < 0) return ` (${gone})`;
  return places !== null && group.size > 1 ? ` (one with ${group.size - 1} other${group.size > 2 ? "s" : ""})` : "";
}

function drawThumbs(layer) {
  const all = page.layers.map((_, index) => importanceOf(index, state.head));
  const distances = all.flatMap((values, index) => {
    const { op, neutral } = page.layers[index];
    return op === null ? [] : Array.from(values, (value) => value - neutral);
  });
  const half = furthest(Float64Array.from(distances), 0, 0.05);
  const scaleAt = (index) => {
    const { op, neutral } = page.layers[index];
    return op === null ? { stops: SEQUENTIAL, low: 0, high: furthest(all[index], 0, 1e-6) } : diverging(neutral, half);
  };
  thumbs.forEach(({ view, note, button }, index) => {
    const { op, keyPlaces, keys } = page.layers[index];
    const here = keys === layer.keys;
    const at = here ? place(keyPlaces, state.key) : -1;
    const [values, other] = [spread(all[index], keyPlaces), here ? state.key : null];
    view.paint({ values, scale: scaleAt(index), places: keyPlaces, chosen: new Set(), other });
    const about = op === null ? ", mean attention" : keyPlaces ? `, ${page.layers[index].keyCount} tokens` : "";
    note.textContent = number(at < 0 ? NaN : all[index][at]) + about;
    button.setAttribute("aria-pressed", index === state.layer);
  });
}

function begin() {
  $("layer").replaceChildren(...page.layers.map(({ name }, index) => element("option", { value: index, textContent: name })));
  $("layer").onchange = (event) => choose({ layer: Number(event.target.value) });
  $("head").onchange = (event) => choose({ head: Number(event.target.value) });
  $("photo").onchange = (event) => choose({ photo: event.target.checked });
  $("photo").parentElement.hidden = !page.runs.some((run) => run.picture);
  for (const [name, title] of MAPS) {
    const map = element("div", { id: name, className: "view", tabIndex: 0, role: "group", ariaLabel: `${title}; arrow keys move the key token` });
    const bar = element("div", { className: "bar" }, element("div", {}), element("p", { className: "ends" }));
    $("maps").append(element("figure", {}, element("figcaption", { textContent: title }), map, bar));
    map.onkeydown = (event) => arrow(event, views[name], "key");
  }
  $("picker").onkeydown = (event) => arrow(event, views.query, "query");
  page.layers.forEach((layer, index) => {
    const [box, note] = [element("div", { className: "view" }), element("small", {})];
    const button = element("button", { type: "button" }, element("span", { textContent: layer.name }), box, note);
    const view = new View(box, sequenceOf(layer, "keys"), true, (token, isClick) => {
      if (!isClick && page.layers[state.layer].keys === layer.keys) choose({ key: token });
    });
    button.onclick = () => choose({ layer: index });
    thumbs.push({ view, note, button });
    $("layers").append(button);
  });
  document.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.nodeName === "SELECT" && event.key !== "Escape") return; // which letters are typed into
    const heads = page.layers[state.layer].heads;
    const [layers, others] = [{ "[": state.layer - 1, "]": state.layer + 1 }, { ",": state.head - 1, ".": state.head + 1 }];
    const move = event.key in layers ? { layer: layers[event.key] } : event.key in others ? { head: others[event.key] } : {};
    if (event.key === "Escape") choose({ pinned: false });
    const next = { ...state, ...move };
    if (page.layers[next.layer] && next.head >= -1 && next.head < heads) choose(move);
  };
  const middle = middleOf(sequenceOf(page.layers[0], "queries"));
  choose({ query: middle, key: middle });
  new ResizeObserver(() => draw()).observe(document.body);
  dark.onchange = () => draw();
  document.documentElement.dataset.ready = "yes";
}

function arrow(event, view, side) {
  const token = view.move(state[side], event.key);
  if (token === null) return;
  event.preventDefault();
  choose(side === "query" ? { query: token, pinned: true } : { key: token });
}

begin();
