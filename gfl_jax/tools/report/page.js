"use strict";
// The gallery: chooses, orders and draws images, and says what is known about a box.
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const PER_PAGE = 24, ERRORS = ["class", "localization", "both", "duplicate", "background", "missed"];
const SAYS = { crowd: "a crowd: what is on it does not count", found: "found", nearly: "detected only with the wrong class or too little IoU", missed: "missed" };
const SIDES = ["left", "top", "right", "bottom"];
let chosen = [], first = 0, described = null;

// Every box of a detector on an image as one kind of value; numbers are in pixels of the image.
function boxesOf(version) {
  const objects = version.objects.map(([x1, y1, x2, y2, label, state, score]) => ({ at: [x1, y1, x2, y2], label, kind: data.states[state], score, object: true }));
  const detections = version.detections.map(([x1, y1, x2, y2, label, score, kind, truth, iou], i) => (
    { at: [x1, y1, x2, y2], label, score, kind: data.kinds[kind], truth: objects[truth], iou, sides: version.sides[i] }));
  return objects.concat(detections.filter((box) => box.score >= least()));
}
const least = () => Number(by("score").value);
// How bad a box is: an object that was not found counts 1, a wrong detection its score.
function badness(box) {
  const kind = by("kind").value, label = Number(by("label").value);
  if (label >= 0 && box.label !== label && !(box.truth && box.truth.label === label)) return 0;
  if (box.kind === "nearly") return kind === "any" ? 1 : 0;
  if (!ERRORS.includes(box.kind) || (kind !== "any" && kind !== box.kind)) return 0;
  return box.object ? 1 : box.score;
}

// How far up an image comes: the errors of one detector, or how much those of two differ.
const worth = (one, other = 0) => Math.abs(one - other);

function choose() {
  by("least").textContent = least().toFixed(2);
  const sum = (version) => boxesOf(version).reduce((all, box) => all + badness(box), 0);
  chosen = data.images.map((image) => ({ image, worth: worth(...image.versions.map(sum)) }))
    .filter((entry) => entry.worth > 1e-6).sort((a, b) => b.worth - a.worth);
  first = 0;
  show();
}

function show() {
  hide();
  const last = Math.min(first + PER_PAGE, chosen.length);
  by("place").textContent = chosen.length ? `${first + 1} to ${last} of ${chosen.length} images` : "no such image";
  by("back").disabled = first === 0;
  by("next").disabled = last >= chosen.length;
  by("shown").replaceChildren(...chosen.slice(first, last).map((entry) => figure(entry.image)));
}

function element(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
function html(name, text, style = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = style;
  return made;
}

function figure(image) {
  const made = html("figure", "", "picture");
  image.versions.forEach((version, i) => made.append(drawing(image, version, data.versions[i])));
  return made;
}

function drawing(image, version, title) {
  const [width, height] = image.size, boxes = boxesOf(version);
  const counts = ERRORS.map((kind) => [boxes.filter((box) => box.kind === kind).length, kind]).filter(([n]) => n).map((pair) => pair.join(" ")).join(", ");
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "application", "aria-label": `${title} ${image.name}: ${counts || "no errors"}. Arrow keys go through its boxes` },
    element("image", { href: image.picture, width, height }));
  for (const box of boxes) {
    const [x, y, right, bottom] = box.at, size = { x, y, width: Math.max(right - x, 0), height: Math.max(bottom - y, 0) };
    const faint = badness(box) || (by("kind").value === "any" && Number(by("label").value) < 0) ? "" : " faint";
    svg.append(element("rect", { ...size, class: `under ${box.kind}${faint}` }));
    box.drawn = svg.appendChild(element("rect", { ...size, class: `box ${box.kind}${faint}` }));
  }
  let current = -1;
  const pick = (i) => {
    for (const { drawn } of boxes) drawn.classList.remove("chosen");
    current = i;
    svg.classList.toggle("picked", i >= 0);
    if (i < 0) return hide();
    boxes[i].drawn.classList.add("chosen");
    if (boxes[i].truth) boxes[i].truth.drawn.classList.add("chosen");
    describe(boxes[i]);
  };
  // Of the boxes under the pointer the smallest: the others contain it.
  const under = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const area = ([x1, y1, x2, y2]) => (x2 - x1) * (y2 - y1);
    let best = -1;
    boxes.forEach(({ at }, i) => {
      const inside = point.x >= at[0] && point.x <= at[2] && point.y >= at[1] && point.y <= at[3];
      if (inside && (best < 0 || area(at) <= area(boxes[best].at))) best = i;
    });
    return best;
  };
  svg.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") pick(under(event)); });
  svg.addEventListener("click", (event) => pick(under(event)));
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") pick(-1); });
  svg.addEventListener("blur", () => pick(-1));
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) pick(0); });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") pick(-1);
    if (!step || !boxes.length) return;
    event.preventDefault();
    pick((Math.max(current, step > 0 ? -1 : 0) + step + boxes.length) % boxes.length);
  });
  const made = html("div", "");
  made.append(svg, html("figcaption", `${title}${title && ", "}${image.name}: ${counts || "no errors"}`));
  return made;
}

function hide() { by("card").hidden = true; }

function describe(box) {
  described = box;
  const card = by("card"), name = data.names[box.label];
  card.className = box.kind;
  const score = box.object ? "" : ` ${box.score.toFixed(2)}`;
  card.replaceChildren(html("strong", name + score), html("div", box.object ? aboutObject(box) : aboutDetection(box)));
  if (box.sides) card.append(distributions(box));
  card.hidden = false;
  beside();
}
// Puts the card beside its box, also when the page is scrolled, as by the focus.
function beside() {
  const card = by("card"), box = described;
  if (card.hidden) return;
  const place = box.drawn.getBoundingClientRect(), own = card.getBoundingClientRect();
  const left = place.right + own.width + 12 < innerWidth ? place.right + 12 : place.left - own.width - 12;
  card.style.left = `${Math.max(8, Math.min(left, innerWidth - own.width - 8))}px`;
  card.style.top = `${Math.max(8, Math.min(place.top, innerHeight - own.height - 8))}px`;
}
const aboutObject = (box) => `annotated object, ${SAYS[box.kind]}${box.kind === "found" ? ` with a score of ${box.score.toFixed(2)}` : ""}`;
const aboutDetection = (box) => `${ERRORS.includes(box.kind) ? "error: " : ""}${box.kind}; ${box.truth ? `IoU ${box.iou.toFixed(2)} with ${data.names[box.truth.label]}` : "IoU 0 with every object"}`;

// Four curves, each over the positions of its side; full line: the box, dashed: the object.
function distributions(box) {
  const [ends, spread, digits] = box.sides, bins = digits.length / 4, made = html("div", "", "sides");
  SIDES.forEach((side, i) => {
    let [start, end] = ends.slice(2 * i, 2 * i + 2), values = [...digits.slice(i * bins, (i + 1) * bins)].map((c) => data.digits.indexOf(c) / 63);
    if (start > end) { [start, end] = [end, start]; values.reverse(); }
    const at = (position) => (100 * (position - start)) / (end - start);
    const path = values.map((v, k) => `L${(100 * k) / (bins - 1)} ${40 - 38 * v}`).join("");
    const chart = element("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", "aria-hidden": true },
      element("path", { d: `M0 40${path}L100 40` }), element("line", { x1: at(box.at[i]), x2: at(box.at[i]), y1: 0, y2: 40 }));
    if (box.truth) {
      const x = at(box.truth.at[i]);
      if (x >= 0 && x <= 100) chart.append(element("line", { x1: x, x2: x, y1: 0, y2: 40, class: "true" }));
    }
    const part = html("div", "");
    part.append(chart, `${side} ${box.at[i].toFixed(0)} ± ${spread[i].toFixed(1)} px`);
    made.append(part);
  });
  return made;
}

for (const kind of ERRORS) by("kind").append(new Option(kind, kind));
data.names.forEach((name, i) => by("label").append(new Option(name, i)));
for (const kind of ["correct", ...ERRORS, "found"]) {
  const item = html("li", kind === "found" ? "annotated object" : kind, kind);
  item.prepend(element("svg", { viewBox: "0 0 24 14", "aria-hidden": true }, element("rect", { x: 2, y: 2, width: 20, height: 10 })));
  by("legend").append(item);
}
by("score").min = data.threshold;
by("score").value = data.threshold;
for (const id of ["kind", "label", "score"]) by(id).addEventListener("input", choose);
by("choices").addEventListener("submit", (event) => event.preventDefault());
by("back").addEventListener("click", () => { first -= PER_PAGE; show(); });
by("next").addEventListener("click", () => { first += PER_PAGE; show(); });
addEventListener("scroll", beside, { passive: true });
for (const button of document.querySelectorAll("[data-kind]"))
  button.addEventListener("click", () => { by("kind").value = button.dataset.kind; choose(); by("pictures").scrollIntoView(); });
if (data.versions.length > 1) {
  by("shown").classList.add("pairs");
  by("order").textContent = "The images on which the errors of the two differ most first.";
}
choose();
