(function () {
  var table = document.getElementById('layers');
  var heads = Array.from(table.tHead.rows[0].cells);
  var body = table.tBodies[0];
  var rows = Array.from(body.rows);
  function value(row, column) {
    var text = row.cells[column].dataset.v;
    return text === undefined ? row.rowIndex : Number(text);
  }
  heads.forEach(function (head, column) {
    head.firstChild.addEventListener('click', function () {
      var was = head.getAttribute('aria-sort');
      heads.forEach(function (other) { other.removeAttribute('aria-sort'); });
      var order = rows.slice();
      // The first column brings back the order of the model.
      if (column > 0) {
        var sign = was === 'descending' ? 1 : -1;
        head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
        order.sort(function (a, b) {
          return sign * (value(a, column) - value(b, column));
        });
      }
      order.forEach(function (row) { body.appendChild(row); });
    });
  });
})();
