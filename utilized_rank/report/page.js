(function () {
  var table = document.getElementById('layers');
  if (!table) return;
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
  var filter = document.getElementById('filter');
  filter.addEventListener('input', function () {
    var wanted = filter.value.toLowerCase();
    rows.forEach(function (row) {
      var name = row.cells[0].title.toLowerCase();
      row.hidden = name.indexOf(wanted) < 0;
    });
  });
  // What is shown, in the order it is shown in.
  function records() {
    var titles = heads.map(function (head) { return head.textContent; });
    return Array.from(body.rows).filter(function (row) {
      return !row.hidden;
    }).map(function (row) {
      var record = {};
      titles.forEach(function (title, column) {
        var number = value(row, column);
        // -1 stands for what is not known.
        record[title] = column ? (number < 0 ? null : number)
          : row.cells[0].title;
      });
      return record;
    });
  }
  function csv(list) {
    var titles = heads.map(function (head) { return head.textContent; });
    var quoted = function (v) {
      return v === null ? '' : '"' + String(v).replace(/"/g, '""') + '"';
    };
    return [titles].concat(list.map(function (record) {
      return titles.map(function (title) { return record[title]; });
    })).map(function (line) { return line.map(quoted).join(','); }).join('\n');
  }
  document.querySelectorAll('[data-save]').forEach(function (button) {
    button.addEventListener('click', function () {
      var kind = button.dataset.save, list = records();
      var text = kind === 'csv' ? csv(list) : JSON.stringify(list, null, 1);
      var link = document.createElement('a');
      link.href = URL.createObjectURL(new Blob([text]));
      link.download = 'layers.' + kind;
      link.click();
      URL.revokeObjectURL(link.href);
    });
  });
})();
