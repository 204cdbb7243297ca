"use strict";
// Cards of samples stand close below one another, each in the column that it has in plain rows, however tall others are.
(() => {
  const ROW = 4, GAP = 16;  // pixels
  for (const box of document.querySelectorAll(".samples")) {
    const arrange = () => {
      const columns = getComputedStyle(box).gridTemplateColumns.split(" ").length;
      [...box.children].forEach((card, n) => {
        card.style.gridColumn = String(n % columns + 1);
        card.style.gridRow = `span ${Math.ceil((card.getBoundingClientRect().height + GAP) / ROW)}`;
      });
    };
    const sizes = new ResizeObserver(arrange);
    const watch = () => {
      sizes.disconnect();
      for (const one of [box, ...box.children]) sizes.observe(one);
    };
    box.classList.add("close");
    new MutationObserver(watch).observe(box, { childList: true });
    watch();
  }
})();
