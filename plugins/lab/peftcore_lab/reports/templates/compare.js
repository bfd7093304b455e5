"use strict";

// A click on a heading sorts by it, another one the other way round. Cells without a value stay below.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const words = new Intl.Collator(undefined, { numeric: true });
  const compare = (one, other) => (isNaN(one) || isNaN(other) ? words.compare(one, other) : one - other);
  heads.forEach((head, column) => {
    const value = (row) => row.cells[column].dataset.value;
    head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const next = now ? (now === "ascending" ? "descending" : "ascending") : head.dataset.first;
      const sign = next === "ascending" ? 1 : -1;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      body.append(
        ...[...body.rows].sort((one, other) => {
          const [a, b] = [value(one), value(other)];
          return a === undefined || b === undefined ? (a === undefined) - (b === undefined) : sign * compare(a, b);
        }),
      );
    });
  });
}

// What a pointer rests on stands out wherever it is shown.
let chosen;
document.addEventListener("pointerover", (event) => {
  const entry = event.target.closest("[data-entry]")?.dataset.entry;
  if (entry === chosen) return;
  chosen = entry;
  document.body.classList.toggle("chosen", entry !== undefined);
  for (const mark of document.querySelectorAll("[data-entry]")) {
    mark.classList.toggle("on", mark.dataset.entry === entry);
  }
});
