// The table of losses sorts by its headers and filters by what is typed; without this it stands as is.
"use strict";
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector("table.losses-table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const text = (row, column) => row.cells[column].textContent.trim();

  const label = document.createElement("label");
  label.className = "losses-filter";
  label.textContent = "Show losses with ";
  const input = document.createElement("input");
  input.type = "search";
  input.placeholder = "such as lengths, 2022 or adaptive";
  label.append(input);
  const count = document.createElement("output");
  label.append(" ", count);
  (table.closest(".table-wrapper") ?? table).before(label);

  function filter() {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => content.includes(word));
    }
    count.value = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  }
  input.addEventListener("input", filter);
  filter();

  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...cell.childNodes);
    cell.append(button);
    button.addEventListener("click", () => {
      const order = cell.ariaSort === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      cell.ariaSort = order > 0 ? "ascending" : "descending";
      rows.sort((a, b) => order * text(a, column).localeCompare(text(b, column), "en", { numeric: true }));
      body.append(...rows);
    });
  });
});
