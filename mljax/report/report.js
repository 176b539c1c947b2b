// Sorting by a click on a column's name, and a search field above long tables.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], names = [...table.tHead.rows[0].cells];
  names.forEach((name, column) => {
    const button = document.createElement("button");
    button.append(...name.childNodes);
    name.append(button);
    button.onclick = () => {
      const down = name.getAttribute("aria-sort") !== "descending";
      names.forEach((other) => other.removeAttribute("aria-sort"));
      name.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const apart = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return down ? -apart : apart;
      };
      body.append(...[...body.rows].sort(order));
    };
  });
  if (body.rows.length > 30) {
    const field = document.createElement("input");
    field.className = "filter";
    field.placeholder = "search a label";
    field.setAttribute("aria-label", field.placeholder);
    field.oninput = () => {
      const wanted = field.value.toLowerCase();
      for (const row of body.rows)
        row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    };
    table.parentElement.before(field);
  }
}
