"""What the project promises: one version, lessons in order and in shape, answers that hold."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest

import enhance_lib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
from stamp import BADGE, CODE, INSTALL, stamp
from table import measured, notebooks, over

LESSONS = sorted((ROOT / 'nbs').glob('[0-9][0-9]_*.ipynb'))
NOTEBOOKS = sorted((ROOT / 'nbs').rglob('*.ipynb'))


def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def setting_lines(key):
    return [line.strip() for line in settings()[key].splitlines() if line.strip()]


@cache
def cells(path, kind):
    "The sources of a notebook's cells of one kind."
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == kind]


def outputs(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [output for cell in nb['cells'] for output in cell.get('outputs', [])]


def prose(path):
    "A notebook's Markdown without the blocks of code in it."
    text = '\n\n'.join(cells(path, 'markdown'))
    return re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)


each_lesson = pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)


def test_there_are_lessons():
    "Without notebooks the tests below would pass by not running."
    assert LESSONS and LESSONS[0].name == '01_crappify.ipynb'
    assert len(NOTEBOOKS) > len(LESSONS) + 20, 'the toolbox and the applications too'
    assert (ROOT / 'nbs' / 'index.ipynb').exists()


# The package


def test_version_is_that_of_settings():
    assert enhance_lib.__version__ == settings()['version'], 'run `make setup`'


def test_version_stands_once():
    version = re.compile(r'(?<![\d.])' + re.escape(settings()['version']) + r'(?!\d|\.\d)')
    files = [
        p for p in ROOT.glob('*') if p.suffix in ('.py', '.md', '.toml') or p.stem == 'Makefile'
    ]
    for folder in ('enhance_lib', 'tests', 'tools', 'data', '.ci'):
        files += [p for p in (ROOT / folder).glob('*') if p.suffix in ('.py', '.md', '')]
    texts = {p: p.read_text(encoding='utf-8') for p in files if p.is_file()}
    for path in NOTEBOOKS:
        sources = cells(path, 'markdown') + cells(path, 'code')
        texts[path] = '\n'.join(s for s in sources if not s.startswith(INSTALL))
    found = [str(p.relative_to(ROOT)) for p, text in texts.items() if version.search(text)]
    assert not found, 'the version stands in settings.ini only'


def test_pyproject_holds_no_metadata():
    import tomllib

    config = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
    assert set(config) == {'build-system', 'tool'}
    assert set(config['tool']) == {'nbdev'}


@pytest.mark.parametrize('script', setting_lines('console_scripts'))
def test_console_script_leads_to_a_function(script):
    _, target = script.split('=')
    module, function = target.split(':')
    assert callable(getattr(importlib.import_module(module), function))


def test_command_line_costs_nothing_to_import():
    code = (
        'import sys, enhance_lib.applications.command_line;'
        'print(*sorted({"torch", "fastai", "numpy"} & set(sys.modules)))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_import_is_a_requirement():
    "What the package imports comes with Python, or with something that settings.ini names."
    names = {'PIL': 'pillow', 'skimage': 'scikit-image', 'sklearn': 'scikit-learn'}
    names |= {'pywt': 'PyWavelets'}
    # These come along with a requirement.
    names |= {name: 'ipywidgets' for name in ('IPython', 'matplotlib_inline', 'traitlets')}
    names |= {'fasttransform': 'fastai', 'requests': 'pooch'}
    required = {re.match(r'[\w-]+', line)[0] for line in setting_lines('requirements')}
    missing = set()
    for path in sorted((ROOT / 'enhance_lib').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            for module in {name.split('.')[0] for name in modules}:
                # google.colab is there on Colab only, and imported only there.
                given = module in {*sys.stdlib_module_names, 'enhance_lib', 'google'}
                if not given and names.get(module, module) not in required:
                    missing.add(f'{path.name}: {module}')
    assert not missing


# What is made from something else


def test_stamped_files_are_in_line():
    assert stamp(ROOT, check=True) == [], 'run `make stamp`'


def test_export_and_clean_leave_no_difference(tmp_path):
    "On a copy, so that nobody's work is changed by a test."
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md'):
        shutil.copy(ROOT / name, tmp_path)
    for name in ('nbs', 'enhance_lib'):
        skip = shutil.ignore_patterns('weights', '__pycache__', '.ipynb_checkpoints')
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)

    def contents():
        found = [*tmp_path.rglob('nbs/**/*.ipynb'), *tmp_path.rglob('enhance_lib/**/*.py')]
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in found}

    before = contents()
    for command in ('nbdev-export', 'nbdev-clean'):
        subprocess.run([Path(sys.executable).parent / command], cwd=tmp_path, check=True)
    after = contents()
    different = [name for name in before | after if before.get(name) != after.get(name)]
    assert not different, 'run `make clean-notebooks`'


# The lessons


def module_of(path):
    "The module that a notebook exports."
    found = re.findall(
        r'^#\| default_exp ([\w.]+)', '\n'.join(cells(path, 'code')), flags=re.MULTILINE
    )
    assert len(found) == 1, f'{path.name} needs one `#| default_exp`'
    return found[0]


def imports_of(path):
    "What a module imports from the package, anywhere in it: names below `enhance_lib`."
    home = path.relative_to(ROOT / 'enhance_lib').parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            base = list(home[: len(home) - node.level + 1]) if node.level else []
            parts = [*base, *(node.module or '').split('.')] if node.module else base
            names = ['.'.join(parts)]
            if not node.module or node.module == 'enhance_lib':  # from . import x
                names = ['.'.join([*base, alias.name]) for alias in node.names]
            if node.level or (node.module or '').split('.')[0] == 'enhance_lib':
                found |= {name.removeprefix('enhance_lib').lstrip('.') for name in names}
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith('enhance_lib.')]
            found |= {name.removeprefix('enhance_lib.') for name in names}
    return found - {'', '__version__'}


ORDER = {module_of(path): i for i, path in enumerate(LESSONS)}  # of the lessons' modules
MODULES = [p for p in sorted((ROOT / 'enhance_lib').rglob('*.py')) if not p.stem.startswith('_')]


@pytest.mark.parametrize(
    'path', MODULES, ids=lambda p: p.relative_to(ROOT / 'enhance_lib').as_posix()
)
def test_module_imports_what_its_place_in_the_house_allows(path):
    "The toolbox imports no lesson; a lesson the toolbox and lessons before it; applications all."
    name = '.'.join(path.relative_to(ROOT / 'enhance_lib').with_suffix('').parts)
    allowed = {'toolbox'}
    if name in ORDER:
        allowed |= {module for module, i in ORDER.items() if i < ORDER[name]}
    elif name.startswith('applications.'):
        allowed |= {'applications', *ORDER}
    else:
        assert name.startswith('toolbox.'), 'a module is of the toolbox, a lesson or an application'
    wrong = {i for i in imports_of(path) if i.split('.')[0] not in allowed}
    assert not wrong


@pytest.mark.parametrize('name', notebooks())
def test_notebook_is_within_its_limits(name):
    row, longest = measured(notebooks()[name])
    assert not over(name, row), f'{row}; the longest function is {longest}: see tools/table.py'


HEADINGS = [
    'What you will learn',
    'See it first',
    'Break it',
    'Your own photo',
    'Try it yourself',
    'What you learned',
    'Questions',
    'Further reading',
]


@each_lesson
def test_lesson_has_its_parts(path):
    first = cells(path, 'markdown')[0].splitlines()
    assert first[0].startswith('# ')
    assert any(line.startswith('> ') for line in first), 'a promise, quoted'
    assert any(line.startswith(BADGE) for line in first)

    headings = re.findall(r'^## +(.+)', prose(path), flags=re.MULTILINE)
    missing = [h for h in HEADINGS if not any(g.lower().startswith(h.lower()) for g in headings)]
    assert not missing

    header = prose(path).split('\n## See it first')[0]
    table = '\n'.join(line for line in header.splitlines() if line.startswith('|'))
    assert all(budget in table for budget in ('smoke', 'lesson', 'full')), 'a table of the budgets'
    assert len(prose(path).split()) >= 1000, 'words'


@each_lesson
def test_lesson_was_run_and_reads_well(path):
    assert path.stat().st_size < 3_000_000
    kinds = [mime for output in outputs(path) for mime in output.get('data', {})]
    assert any(kind.startswith('image/') for kind in kinds), 'no picture: was it run?'
    assert not [o for o in outputs(path) if o['output_type'] == 'error']
    printing = [s for s in cells(path, 'code') if re.search(r'(?<![\w.])print\(', s)]
    assert not printing, 'a shown value or picture instead of print'


@each_notebook
def test_notebook_names_no_place_on_a_disk(path):
    texts = cells(path, 'markdown') + cells(path, 'code')
    for output in outputs(path):
        shown = {k: v for k, v in output.get('data', {}).items() if not k.startswith('image/')}
        texts.append(json.dumps([shown, output.get('text'), output.get('traceback')]))
    place = re.compile(r'(?<![\w.)}])/(?:home|Users|tmp|root|work|var|usr)/.{0,40}')
    found = [match[0] for text in texts for match in place.finditer(text)]
    assert not found


@each_notebook
def test_every_figure_is_filled_in(path):
    "Measured times are written in last, and easily forgotten."
    assert not re.findall(r'\b(?:TIME|MEM)_\w+|\bTODO\b', prose(path))


@each_notebook
def test_links_lead_to_files(path):
    text = re.sub(CODE, '', prose(path), flags=re.DOTALL)
    links = re.findall(r'\]\(([^)\s]+)', text)
    own = [link for link in links if not re.match(r'[a-z][a-z+.-]*:|#', link)]
    broken = [link for link in own if not (path.parent / link.split('#')[0]).exists()]
    assert not broken


# The exercises


def exercises(path):
    "Numbers and sources of the stub, the check and the answer of each exercise in a lesson."
    nb = json.loads(path.read_text(encoding='utf-8'))
    found, number = {}, None
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        heading = re.search(r'^### Exercise (\d+):', source, flags=re.MULTILINE)
        part = re.match(r'# Exercise (\d+): (your answer|check)', source)
        if cell['cell_type'] == 'markdown' and heading:
            number = int(heading[1])
            found[number] = {}
        if cell['cell_type'] == 'markdown' and number and '<details>' in source:
            blocks = re.findall(r'^```python\n(.*?)^```', source, flags=re.DOTALL | re.MULTILINE)
            found[number]['answer'] = '\n'.join(blocks)
            number = None
        if cell['cell_type'] == 'code' and part:
            found.setdefault(int(part[1]), {})[part[2]] = source
    return found


@cache
def lesson_names(path):
    "What an exercise can use: the names in the lesson's module and those of its set-up cell."
    import matplotlib

    matplotlib.use('Agg')
    os.environ['ENHANCE_BUDGET'] = 'smoke'
    setup = [source for source in cells(path, 'code') if source.startswith('# Set up')]
    assert len(setup) == 1, 'one code cell must start with `# Set up`'
    # In the lesson, what is exported was defined in the kernel: its imports are there too.
    module = importlib.import_module(f'enhance_lib.{module_of(path)}')
    names = {k: v for k, v in vars(module).items() if not k.startswith('__')}
    # A kernel has `display` without an import.
    exec('from IPython.display import display', names)
    exec(setup[0], names)
    return names


@each_lesson
def test_lesson_has_exercises(path):
    found = exercises(path)
    assert len(found) >= 3
    for number, parts in found.items():
        assert set(parts) == {'your answer', 'check', 'answer'}, f'exercise {number}'


ALL_EXERCISES = [
    pytest.param(path, number, id=f'{path.stem}-{number}')
    for path in LESSONS
    for number in exercises(path)
]


@pytest.mark.parametrize('path, number', ALL_EXERCISES)
def test_exercise_tells_right_from_wrong(path, number, monkeypatch):
    "The check must fail on the stub that learners start from, and pass on the lesson's answer."
    hints = []
    monkeypatch.setattr('IPython.display.display', lambda *o, **k: hints.extend(o))
    parts, name = exercises(path)[number], f'exercise_{number}'

    def checked(answer):
        names = dict(lesson_names(path))  # fresh: no exercise leans on another
        exec(answer, names)
        exec(parts['check'], names)
        return names[name]

    assert checked(parts['your answer']) is False, 'the check passes without an answer'
    hints.clear()
    right = checked(parts['answer'])
    assert right is True, [getattr(hint, 'data', hint) for hint in hints]


def test_the_source_distribution_builds_from_itself(tmp_path):
    "setup.py reads settings.ini, which has to be in the archive too."
    names = subprocess.run(
        ['git', 'ls-files', '*.py', '*.ini', '*.in', '*.toml', 'README.md', 'LICENSE'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in names:
        (tmp_path / 'copy' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / 'copy' / name)
    build = [sys.executable, 'setup.py', '-q', 'sdist', '-d', str(tmp_path)]
    subprocess.run(build, cwd=tmp_path / 'copy', check=True, capture_output=True)
    (archive,) = tmp_path.glob('*.tar.gz')
    shutil.unpack_archive(archive, tmp_path / 'again', filter='data')
    (folder,) = (tmp_path / 'again').iterdir()
    ask = [sys.executable, 'setup.py', '--version']
    said = subprocess.run(ask, cwd=folder, capture_output=True, text=True)
    assert said.stdout.strip().splitlines()[-1:] == [settings()['version']], said.stderr
