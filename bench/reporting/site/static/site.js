// Sorting is tablesort's; this makes its headings buttons for the keyboard, and filters rows. Without JavaScript the tables are whole.
"use strict";

function makeSortable(table) {
  const headings = [...table.tHead.rows[0].cells].filter((heading) => heading.dataset.sortMethod !== "none");
  // The best is what one looks for: figures begin with the largest. Seen before tablesort, which turns the order round.
  const beginWithLargest = (event) => {
    const heading = event.target.closest("th[data-sort-method='number']");
    if (heading && !heading.hasAttribute("aria-sort") && (event.type === "click" || event.key === "Enter")) {
      heading.setAttribute("aria-sort", "ascending");
    }
  };
  table.tHead.addEventListener("click", beginWithLargest, true);
  table.tHead.addEventListener("keydown", beginWithLargest, true);
  new Tablesort(table);
  for (const heading of headings) {
    heading.removeAttribute("tabindex"); // the button inside takes the focus
    heading.querySelector("button").disabled = false;
  }
}

function makeFilterable(form) {
  const table = document.getElementById(form.dataset.filters);
  const [text, method, backbone] = ["text", "method", "backbone"].map((name) => form.querySelector(`[data-filter=${name}]`));
  const rows = [...table.tBodies[0].rows];
  const apply = () => {
    const words = text.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const name = `${row.dataset.method} ${row.dataset.backbone}`.toLowerCase();
      row.hidden = !(
        words.every((word) => name.includes(word)) &&
        (!method.value || method.value === row.dataset.method) &&
        (!backbone.value || backbone.value === row.dataset.backbone)
      );
    }
    form.querySelector("output").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("change", apply); // all that some helping software sends
  form.addEventListener("submit", (event) => event.preventDefault());
  form.querySelector("[data-intervals]").addEventListener("change", (event) => {
    table.classList.toggle("with-intervals", event.target.checked);
  });
  form.reset(); // a browser that comes back to the page fills in what was there
  form.hidden = false;
  apply();
}

document.querySelectorAll("table.board").forEach(makeSortable);
document.querySelectorAll("form.filters").forEach(makeFilterable);
