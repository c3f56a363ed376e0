// Tables are sorted by a click, Enter or Space on a header: ascending, descending, as it was.
"use strict";
(() => {
  const collator = new Intl.Collator("en", { numeric: true });
  const number = /^[\[(<>≤≥~≈ ]*([-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)/i;
  const text = (cell) => cell.textContent.trim();

  // The first number of a text, NaN if it does not begin with one.
  const value = (content) => {
    const found = number.exec(content);
    return found ? parseFloat(found[1].replace(/,/g, "").replace("−", "-")) : NaN;
  };

  const isEmpty = (content) => content === "" || /^(nan|none|–|—|-)$/i.test(content);

  // Rows in order of a column: numbers by size, else text; empty cells last either way.
  const ordered = (rows, column, sign) => {
    const keys = new Map(rows.map((row) => [row, text(row.cells[column])]));
    const filled = rows.filter((row) => !isEmpty(keys.get(row)));
    const numeric = filled.every((row) => !Number.isNaN(value(keys.get(row))));
    const compare = (a, b) => (numeric && value(a) - value(b)) || collator.compare(a, b);
    filled.sort((a, b) => sign * compare(keys.get(a), keys.get(b)));
    return [...filled, ...rows.filter((row) => isEmpty(keys.get(row)))];
  };

  const makeSortable = (table) => {
    const body = table.tBodies[0];
    const rows = body ? [...body.rows] : [];
    const width = rows.length ? rows[0].cells.length : 0;
    const even = (row) => row.cells.length === width && [...row.cells].every((c) => c.rowSpan === 1 && c.colSpan === 1);
    if (!table.tHead || table.tBodies.length !== 1 || rows.length < 2 || !rows.every(even)) return;
    const named = (row) => [...row.cells].filter((cell) => text(cell)).length;
    const headers = [...table.tHead.rows].filter(even).sort((a, b) => named(b) - named(a))[0];
    if (!headers) return;
    [...headers.cells].forEach((header, column) => {
      if (!text(header)) return;
      const button = document.createElement("button");
      button.type = "button";
      button.title = "Sort by this column";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => {
        const next = { ascending: "descending", descending: null }[header.getAttribute("aria-sort")];
        const direction = next === undefined ? "ascending" : next;
        for (const other of headers.cells) other.removeAttribute("aria-sort");
        if (direction) header.setAttribute("aria-sort", direction);
        body.append(...(direction ? ordered(rows, column, direction === "ascending" ? 1 : -1) : rows));
      });
    });
    table.classList.add("sortable");
  };

  document.querySelectorAll("main table").forEach(makeSortable);
})();
