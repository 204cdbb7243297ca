"use strict";
(() => {
  const root = document.documentElement;

  const toggle = document.querySelector("button.theme");
  toggle.addEventListener("click", () => {
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
  });

  // A click on a heading sorts; numbers start from the largest, names from A; empty cells and totals stay last.
  function sortBy(th) {
    const body = th.closest("table").tBodies[0];
    const column = th.cellIndex;
    const numeric = th.classList.contains("number");
    const before = th.getAttribute("aria-sort");
    const descending = before ? before === "ascending" : numeric;
    for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...body.rows].map((row, place) => ({ row, place, total: row.classList.contains("total"),
      value: row.cells[column].dataset.sort }));
    rows.sort((a, b) => {
      if (a.total !== b.total) return a.total ? 1 : -1;
      if ((a.value === "") !== (b.value === "")) return a.value === "" ? 1 : -1;
      const order = numeric ? Number(a.value) - Number(b.value)
        : a.value.localeCompare(b.value, undefined, { numeric: true });
      return (descending ? -order : order) || a.place - b.place;
    });
    body.append(...rows.map((entry) => entry.row));
  }
  for (const button of document.querySelectorAll("th button"))
    button.addEventListener("click", () => sortBy(button.closest("th")));

  // Charts tell the values under the pointer.
  const show = (x) => Math.abs(x) >= 1e4 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(2) : String(+x.toPrecision(4));
  for (const figure of document.querySelectorAll("figure.chart[data-points]")) {
    const { series, left, right, low, high, logX, name } = JSON.parse(figure.dataset.points);
    const svg = figure.querySelector("svg");
    const cursor = svg.querySelector(".cursor");
    const readout = figure.querySelector(".readout");
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      if (at < left || at > right) return;
      const share = (at - left) / (right - left);
      const x = logX ? low * Math.pow(high / low, share) : low + share * (high - low);
      cursor.setAttribute("x1", at);
      cursor.setAttribute("x2", at);
      cursor.removeAttribute("visibility");
      const place = (value) => logX ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
      const parts = series.filter((line) => line.points.length).map((line) => {
        const near = line.points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
        return [near[0], `${line.name} ${show(near[1])}`];
      }).filter((part) => Math.abs(place(part[0]) - share) < 0.03);  // a line that ended earlier has no value here
      readout.textContent = parts.length ? `${name} ${show(parts[0][0])}: ` + parts.map((part) => part[1]).join(", ") : "";
    });
    svg.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      readout.textContent = "";
    });
  }
})();
