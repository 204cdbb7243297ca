"use strict";
// Chooses samples by the index, and loads the blocks that hold those in sight.
(() => {
  const { block, rows } = JSON.parse(document.getElementById("index").textContent);
  const [SOURCE, TASK, MARKS] = [1, 2, 3];
  const PAGE = 50;
  const form = document.querySelector("form.choose");
  const shown = document.getElementById("samples");
  const blocks = new Map();
  let chosen = rows.map((_, n) => n);
  let first = 0;

  window.inspection = (number, cards) => blocks.get(number).done(cards);

  function load(number) {
    if (!blocks.has(number)) {
      const entry = {};
      entry.cards = new Promise((resolve, reject) => {
        entry.done = resolve;
        const script = document.createElement("script");
        script.src = `blocks/${String(number).padStart(5, "0")}.js`;
        script.onerror = () => reject(new Error(`${script.src} is missing`));
        document.head.append(script);
      });
      blocks.set(number, entry);
    }
    return blocks.get(number).cards;
  }

  let turn = 0;
  async function show() {
    const mine = ++turn;
    const wanted = chosen.slice(first, first + PAGE);
    const cards = await Promise.all(wanted.map(async (n) => (await load(Math.floor(n / block)))[n % block]));
    if (mine !== turn) return;  // another choice was made while these were loading
    shown.innerHTML = cards.map((card) => `<div>${card}</div>`).join("");  // escaped where it was written
    const last = Math.min(first + PAGE, chosen.length);
    document.getElementById("place").textContent =
      chosen.length ? `${first + 1} – ${last} of ${chosen.length}` : "nothing matches";
    form.previous.disabled = first === 0;
    form.next.disabled = last >= chosen.length;
    document.body.dataset.ready = String(mine);
  }

  function choose() {
    const key = form.key.value.toLowerCase();
    chosen = [];
    rows.forEach((row, n) => {
      if ((!form.source.value || row[SOURCE] === form.source.value)
        && (!form.task.value || row[TASK] === form.task.value)
        && (!form.marked.checked || row[MARKS] > 0)
        && (!key || row[0].toLowerCase().includes(key))) chosen.push(n);
    });
    first = 0;
    show();
  }

  for (const [name, column] of [["source", SOURCE], ["task", TASK]]) {
    const counts = new Map();
    for (const row of rows) counts.set(row[column], (counts.get(row[column]) || 0) + 1);
    const all = new Option(`all (${counts.size})`, "");
    form[name].append(all);
    for (const [value, count] of [...counts].sort((a, b) => b[1] - a[1]))
      if (value) form[name].append(new Option(`${value} (${count})`, value));
    form[name].addEventListener("change", choose);
  }
  form.key.addEventListener("input", choose);
  form.marked.addEventListener("change", choose);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.previous.addEventListener("click", () => { first = Math.max(first - PAGE, 0); show(); scrollTo(0, 0); });
  form.next.addEventListener("click", () => { first += PAGE; show(); scrollTo(0, 0); });
  document.querySelector("button.theme").addEventListener("click", () => {
    const root = document.documentElement;
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
  });
  show();
})();
