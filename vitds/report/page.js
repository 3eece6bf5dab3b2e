"use strict";
// Tables: a click on a heading sorts by its column, a second one the other way round.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement, place = heading.cellIndex, body = heading.closest("table").tBodies[0];
    const falls = heading.getAttribute("aria-sort") === "descending" ? 1 : -1;
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", falls < 0 ? "descending" : "ascending");
    const value = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent;
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return falls * (isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, { numeric: true }) : x - y);
    };
    body.append(...[...body.rows].sort(compare));
  });
}
// The map: the image nearest to the pointer, or to the one before in an arrow's direction, is shown and said.
const map = document.getElementById("scatter");
if (map) {
  const data = JSON.parse(document.getElementById("points").textContent);
  const thumb = document.getElementById("thumb"), said = document.getElementById("said"), ring = document.getElementById("ring");
  const rows = Math.ceil(data.x.length / data.columns);
  let now = -1;
  const show = (i) => {
    if (i < 0 || i === now) return;
    now = i;
    ring.setAttribute("cx", data.x[i]);
    ring.setAttribute("cy", data.y[i]);
    ring.removeAttribute("visibility");
    const cell = thumb.clientWidth;
    thumb.style.backgroundSize = `${data.columns * cell}px ${rows * cell}px`;
    thumb.style.backgroundPosition = `${-(i % data.columns) * cell}px ${-Math.floor(i / data.columns) * cell}px`;
    const words = [data.name[i]];
    if (data.label[i] >= 0) words.push(`class: ${data.classes[data.label[i]]}`);
    if (data.predicted) {
      const right = data.predicted[i] === data.label[i];
      words.push(right ? "✓ right" : `✗ wrong, taken for ${data.classes[data.predicted[i]]}`);
    }
    said.textContent = words.join(" · ");
  };
  const nearest = (cost) => {
    let best = -1, least = Infinity;
    for (let i = 0; i < data.x.length; i++) {
      const c = cost(data.x[i], data.y[i], i);
      if (c < least) [best, least] = [i, c];
    }
    return best;
  };
  const point = (event) => {
    const box = map.getBoundingClientRect(), scale = data.side / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    show(nearest((a, b) => (a - x) ** 2 + (b - y) ** 2));
  };
  map.addEventListener("pointermove", point);
  map.addEventListener("pointerdown", point);
  const steps = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  map.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step && event.key !== "Home") return;
    event.preventDefault();
    if (now < 0 || !step) return show(nearest((a, b) => a + b));
    const [dx, dy] = step, x = data.x[now], y = data.y[now];
    // Sideways counts double, so that a row of key presses goes where the arrow points.
    show(nearest((a, b, i) => {
      const ahead = (a - x) * dx + (b - y) * dy, aside = Math.abs((a - x) * dy) + Math.abs((b - y) * dx);
      return i === now || ahead <= 0 || aside > 2 * ahead ? Infinity : ahead + 2 * aside;
    }));
  });
  map.addEventListener("focus", () => now < 0 && show(nearest((a, b) => a + b)));
}
