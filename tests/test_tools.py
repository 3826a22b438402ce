"""The tools behind `make course` and `make stamp`, on small projects in temporary folders."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
import stamp

HEADER = '# A lesson\n\n> What it promises.\n\n[![Open in Colab](old)](old)'
INSTALL = '# On Colab this installs something old'
PICTURE = """#| gallery
#| readme square
from PIL import Image
Image.new('RGB', (8, 8), 'red')"""


def save(path, *sources):
    "A notebook of one Markdown cell and then code cells."
    text, *code = sources
    path.parent.mkdir(exist_ok=True)
    notebook = [new_markdown_cell(text)] + [new_code_cell(source) for source in code]
    nbformat.write(new_notebook(cells=notebook), path)


def run_course(root, *names):
    "Run the tool on another project: it works on the one that it lies in."
    shutil.copytree(ROOT / 'tools', root / 'tools', dirs_exist_ok=True)
    command = [sys.executable, root / 'tools' / 'course.py', *names]
    return subprocess.run(command, capture_output=True, text=True)


def test_course_goes_on_after_a_failure_and_reports_it(tmp_path):
    save(tmp_path / 'nbs' / '00_bad.ipynb', HEADER, 'x = 1', '#| hide\nx / 0', 'x = 2')
    clean = "import os, sys\nsys.executable + ' ' + os.environ['ENHANCE_BUDGET']"
    save(tmp_path / 'nbs' / '01_good.ipynb', HEADER, clean, PICTURE)
    done = run_course(tmp_path)
    assert done.returncode == 1
    assert 'FAILED: 00_bad, code cell 2 (x / 0): ZeroDivisionError: division by zero' in done.stdout
    assert '\x1b' not in done.stdout, 'color codes in a log'
    assert '1 of 2 notebooks failed: 00_bad' in done.stderr

    gallery = (tmp_path / '_course' / 'index.html').read_text(encoding='utf-8')
    assert 'What it promises.' in gallery and 'src="data:image/png;base64,' in gallery
    assert 'ZeroDivisionError' in gallery
    assert 'ZeroDivisionError' in (tmp_path / '_course' / '00_bad.ipynb').read_text(
        encoding='utf-8'
    )
    ran = (tmp_path / '_course' / '01_good.ipynb').read_text(encoding='utf-8')
    assert f'{sys.executable} smoke' in ran, 'another Python, or another budget'


def test_answers_stay_folded_on_the_page(tmp_path):
    answer = (
        '<details><summary>Answer</summary>\n\nForty-two.\n\n```python\nx = 42\n```\n\n</details>'
    )
    save(tmp_path / 'nbs' / '00_one.ipynb', f'{HEADER}\n\n{answer}', '1 + 1')
    assert run_course(tmp_path).returncode == 0
    page = (tmp_path / '_course' / '00_one.html').read_text(encoding='utf-8')
    assert page.index('<details>') < page.index('Forty-two') < page.index('</details>')


def test_course_names_an_unknown_lesson(tmp_path):
    save(tmp_path / 'nbs' / '00_one.ipynb', HEADER)
    done = run_course(tmp_path, '00_two')
    assert done.returncode == 1
    assert done.stderr.strip() == 'No such lesson in nbs/: 00_two'


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project of a front page and a lesson."
    monkeypatch.setattr(stamp, 'datasets_page', lambda: 'the photo sets\n')
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    save(tmp_path / 'nbs' / 'index.ipynb', '# Front\n\n[one](00_one.ipynb)', '#| hide\nsecret = 1')
    save(tmp_path / 'nbs' / '00_one.ipynb', HEADER, INSTALL)
    return tmp_path


def set_user(root, name):
    path = root / 'settings.ini'
    lines = path.read_text(encoding='utf-8').splitlines()
    lines = [f'user = {name}' if line.startswith('user =') else line for line in lines]
    path.write_text('\n'.join(lines), encoding='utf-8')


def test_stamp_writes_what_check_names(project):
    set_user(project, 'somebody')
    lesson = project / 'nbs' / '00_one.ipynb'
    before = lesson.read_bytes()
    named = stamp.stamp(project, check=True)
    assert named == ['nbs/00_one.ipynb', 'README.md', 'data/README.md']
    assert lesson.read_bytes() == before and not (project / 'README.md').exists()

    assert stamp.stamp(project) == named
    assert stamp.stamp(project, check=True) == []
    nb = nbformat.read(lesson, as_version=4)
    assert 'github/somebody/enhance_lib/blob/main/nbs/00_one.ipynb)' in nb.cells[0].source
    assert '%pip install' in nb.cells[1].source and '/somebody/enhance_lib@v' in nb.cells[1].source
    assert nb.metadata.accelerator == 'GPU'
    readme = (project / 'README.md').read_text(encoding='utf-8')
    assert '[one](nbs/00_one.ipynb)' in readme and 'secret' not in readme


def test_a_course_without_publisher_says_so_on_colab(project, monkeypatch):
    set_user(project, 'OWNER')
    stamp.stamp(project)
    nb = nbformat.read(project / 'nbs' / '00_one.ipynb', as_version=4)
    exec(nb.cells[1].source, {})  # elsewhere it does nothing
    monkeypatch.setitem(sys.modules, 'google.colab', sys)
    with pytest.raises(RuntimeError, match='no publisher yet.*settings.ini'):
        exec(nb.cells[1].source, {})


def test_stamp_names_the_lesson_without_a_badge(project):
    save(project / 'nbs' / '00_one.ipynb', '# No badge', INSTALL)
    with pytest.raises(ValueError, match='00_one.ipynb.*Open in Colab'):
        stamp.stamp(project)


@pytest.mark.parametrize(
    'link, moved',
    [
        ('[a](01_a.ipynb#top)', '[a](nbs/01_a.ipynb#top)'),
        ('![a](images/a.jpg)', '![a](nbs/images/a.jpg)'),
        ('<img src="images/a.jpg">', '<img src="nbs/images/a.jpg">'),
        ('[a](../LICENSE)', '[a](LICENSE)'),
        ('[a](https://a.org/b)', '[a](https://a.org/b)'),
        ('[a](#below)', '[a](#below)'),
        ('[a](mailto:a@b.org)', '[a](mailto:a@b.org)'),
        ('`layers[0](x)`', '`layers[0](x)`'),
    ],
)
def test_links_of_the_front_page_work_from_the_root(link, moved):
    assert stamp.from_root(link) == moved
