"""How much a learner has to read: a row per notebook, and what is over the limits of the house."""

import ast
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 'cells', 'words', 'code', 'exported', 'longest', 'raise'
# the most that a notebook may have: lines of code in all cells, exported lines, lines of the
# longest exported function, and `raise` statements in exported cells
LESSON = {'code': 500, 'longest': 30, 'raise': 3}
TOOLBOX = {'exported': 350}
EXEMPT = {'toolbox/files', 'toolbox/folders'}


def notebooks(root=ROOT):
    "Every notebook that exports a module, by its name from `nbs`."
    home = root / 'nbs'
    found = [*home.glob('[0-9][0-9]_*.ipynb'), *home.glob('toolbox/*.ipynb')]
    found += home.glob('applications/*.ipynb')
    return {p.relative_to(home).with_suffix('').as_posix(): p for p in sorted(found)}


def n_lines(source):
    "Lines of code: all that are not empty, nor directives of nbdev."
    return sum(bool(line.strip()) and not line.startswith('#|') for line in source.splitlines())


def measured(path):
    "The numbers of one notebook, by column, and the name of its longest exported function."
    cells = nbformat.read(path, as_version=4).cells
    code = [c.source for c in cells if c.cell_type == 'code']
    exported = [s for s in code if s.startswith('#| export')]
    nodes = [node for source in exported for node in ast.walk(ast.parse(source))]
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in nodes if isinstance(n, ast.FunctionDef)}
    longest = max(lengths, key=lengths.get, default='')
    numbers = (
        len(cells),
        sum(len(c.source.split()) for c in cells if c.cell_type == 'markdown'),
        sum(map(n_lines, code)),
        sum(map(n_lines, exported)),
        lengths.get(longest, 0),
        sum(isinstance(node, ast.Raise) for node in nodes),
    )
    return dict(zip(COLUMNS, numbers)), longest


def over(name, row):
    "The columns in which a notebook is over its limits."
    limits = TOOLBOX if name.startswith('toolbox/') else LESSON if name[0].isdigit() else {}
    return [c for c, most in limits.items() if row[c] > most and name not in EXEMPT]


def main():
    "Print the table; the exit code says whether all is within the limits."
    sys.stdout.write(f'{"notebook":28}{"".join(f"{c:>10}" for c in COLUMNS)}\n')
    failed = False
    for name, path in notebooks().items():
        row, longest = measured(path)
        marks = over(name, row)
        failed = failed or bool(marks)
        numbers = ''.join(f'{row[c]:>9}{"!" if c in marks else " "}' for c in COLUMNS)
        sys.stdout.write(f'{name:28}{numbers} {longest}\n')
    if failed:
        sys.stdout.write(
            f'! more than a lesson {LESSON} or a toolbox notebook {TOOLBOX} may have\n'
        )
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
