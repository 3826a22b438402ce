"""Bring everything that repeats settings.ini or a notebook in line with it.

`make stamp` runs this after a change of the version, the publisher or the front page;
with `--check` it changes nothing, names what differs and fails.
"""

import base64
import posixpath
import re
from configparser import ConfigParser
from pathlib import Path

import nbformat
from fastcore.nbio import nb2str, read_nb
from fastcore.script import call_parse
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
BADGE = '[![Open in Colab]'
INSTALL = '# On Colab this installs'
CODE = r'```.*?```|~~~.*?~~~|`[^`\n]*`'  # in Markdown


def install_cell(cfg):
    "The cell that makes a lesson run on Colab. It is the same in every lesson."
    head = (
        f'{INSTALL} the enhance_lib that this lesson belongs to; elsewhere it does nothing.\n'
        'import sys\n\n'
        "if 'google.colab' in sys.modules:\n"
    )
    if cfg['user'] == 'OWNER':
        return head + (
            '    raise RuntimeError(\n'
            "        'This copy of the course has no publisher yet, so Colab cannot install it. '\n"
            "        'Put a GitHub account as user into settings.ini, then run `make stamp`.'\n"
            '    )'
        )
    address = f'git+https://github.com/{cfg["user"]}/{cfg["repo"]}@v{cfg["version"]}'
    return head + f"    %pip install -q 'enhance_lib @ {address}'"


def stamp_lesson(path, cfg):
    "The lesson's text with its badge, install cell and wish for a GPU as they should be."
    nb = read_nb(path)
    first = nb.cells[0]
    lines = first.source.split('\n')
    badges = [i for i, line in enumerate(lines) if line.startswith(BADGE)]
    if len(badges) != 1 or first.cell_type != 'markdown':
        raise ValueError(f'{path.name}: its first cell needs one line that starts with {BADGE}')
    lines[badges[0]] = (
        f'{BADGE}(https://colab.research.google.com/assets/colab-badge.svg)]'
        '(https://colab.research.google.com/github/'
        f'{cfg["user"]}/{cfg["repo"]}/blob/{cfg["branch"]}/nbs/{path.name})'
    )
    first.set_source('\n'.join(lines))

    cells = [c for c in nb.cells if c.cell_type == 'code' and c.source.startswith(INSTALL)]
    if len(cells) != 1:
        raise ValueError(f'{path.name}: one code cell must start with {INSTALL}')
    cells[0].set_source(install_cell(cfg))

    nb.metadata['accelerator'] = 'GPU'
    return nb2str(nb)  # nbdev writes notebooks with the same function


def from_root(markdown):
    "`markdown` from a notebook, with links that work from the project's root."

    def moved(match):
        if match['code'] or re.match(r'[a-z][a-z+.-]*:|#|/', match['target']):
            return match[0]
        return match['before'] + posixpath.normpath(posixpath.join('nbs', match['target']))

    links = r'(?P<before>\]\(|\b(?:src|href)=")(?P<target>[^)"\s]+)'
    return re.sub(f'(?P<code>{CODE})|{links}', moved, markdown, flags=re.DOTALL)


def readme(index):
    "README.md and the pictures it shows, as a dictionary from path (from the root) to bytes."
    nb = nbformat.read(index, as_version=4)
    cells = []
    for cell in nb.cells:
        lines = cell.source.split('\n')
        if cell.cell_type == 'code':
            if any(line.strip() == '#| hide' for line in lines):
                continue
            cell.source = '\n'.join(li for li in lines if not li.startswith('#|')).strip()
            if not cell.source and not cell.outputs:
                continue
        else:
            cell.source = from_root(cell.source)
        cells.append(cell)
    nb.cells = cells
    nb.metadata['language_info'] = {'name': 'python'}  # colors the code; cleaning strips it
    where = {'unique_key': 'index', 'output_files_dir': 'nbs/images'}
    text, resources = MarkdownExporter().from_notebook_node(nb, resources=where)
    text = re.sub(r'\n{3,}', '\n\n', text.strip())
    note = '<!-- Made from nbs/index.ipynb by `make stamp`: change it there. -->'
    files = {'README.md': f'{note}\n\n{text}\n'.encode()}
    return files | {name: bytes(data) for name, data in resources['outputs'].items()}


def front_pictures(path):
    "The pictures that a lesson gives to the front page: `#| readme NAME` in a cell names one."
    files = {}
    for cell in read_nb(path).cells:
        match = re.search(r'^#\| readme (\S+)$', cell.source, flags=re.MULTILINE)
        if cell.cell_type != 'code' or not match:
            continue
        found = [
            (ending, output['data'][mime])
            for output in cell.outputs
            for mime, ending in (('image/jpeg', 'jpg'), ('image/png', 'png'))
            if mime in output.get('data', {})
        ]
        if not found:
            raise ValueError(f'{path.name}: the cell with `{match[0]}` has no picture; run it')
        ending, data = found[0]
        files[f'nbs/images/{match[1]}.{ending}'] = base64.b64decode(data)
    return files


def datasets_page():
    "The page on the photo sets, from the table in the toolbox."
    from enhance_lib.toolbox.datasets import datasets_markdown

    return datasets_markdown().rstrip('\n') + '\n'


def wanted(root):
    "What every stamped file should hold, as a dictionary from path (from `root`) to bytes."
    parser = ConfigParser(delimiters=['='])
    parser.read(root / 'settings.ini', encoding='utf-8')
    cfg = parser['DEFAULT']
    files = {}
    for lesson in sorted((root / 'nbs').glob('[0-9][0-9]_*.ipynb')):
        files[f'nbs/{lesson.name}'] = stamp_lesson(lesson, cfg).encode()
        files |= front_pictures(lesson)
    files |= readme(root / 'nbs' / 'index.ipynb')
    files['data/README.md'] = datasets_page().encode()
    return files


def stamp(root, check=False):
    "Write the files that differ from what they should be (unless `check`), and return their names."
    different = []
    for name, data in wanted(root).items():
        path = root / name
        if path.exists() and path.read_bytes() == data:
            continue
        different.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return different


@call_parse
def main(
    check: bool = False,  # Change nothing, and fail if something differs
):
    "Bring badges, install cells, README.md and data/README.md in line with settings.ini and nbs/."
    try:
        different = stamp(ROOT, check)
    except ValueError as error:
        raise SystemExit(f'Cannot stamp: {error}') from None
    for name in different:
        print('differs:' if check else 'written:', name)
    if check and different:
        raise SystemExit('Run `make stamp`.')
    if not different:
        print('Everything is in line with settings.ini and the notebooks.')
