"""Run every lesson in a real Jupyter kernel; write executed lessons, pages and a gallery.

`make course` runs this. It goes on after a lesson that fails, and says at the end what failed.
"""

import html
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import nbformat
from fastcore.script import call_parse
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html, strip_ansi

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = ['smoke', 'lesson', 'full']


class ThisPython(AsyncKernelManager):
    "Starts the Python that runs this script, whatever kernels the user has under the name python3."

    @property
    def kernel_spec(self):
        command = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
        command.append('--log-level=ERROR')  # else each kernel warns of its local connection
        return KernelSpec(argv=command, display_name='Python 3', language='python')


def page_name(notebook):
    "The file name of a notebook's page; index.html is the gallery's."
    return 'front_page.html' if notebook.stem == 'index' else f'{notebook.stem}.html'


@dataclass
class Lesson:
    "One notebook on its way through the course."

    path: Path
    title: str = ''
    promise: str = ''  # the quoted line under the title
    cells: int = 0  # code cells with something in them
    cell: int = 0  # the one that runs now, counted from 1, as Jupyter's In [n]
    started: float = 0.0
    seconds: float = 0.0
    error: str = ''  # one line
    traceback: str = ''
    gallery: list[str] = field(default_factory=list)  # pieces of HTML

    @property
    def name(self):
        return self.path.stem

    @property
    def page(self):
        return page_name(self.path)


def runs(cell):
    return cell.cell_type == 'code' and bool(cell.source.strip())


def has_line(cell, directive):
    "Whether `cell` is a code cell with the line `#| directive`."
    lines = [line.strip() for line in cell.source.splitlines()]
    return cell.cell_type == 'code' and f'#| {directive}' in lines


def first_line(source):
    "The first line of `source` that says something."
    lines = [line.strip() for line in source.splitlines()]
    return next((line for line in lines if line and not line.startswith('#|')), '')


def read_header(lesson, nb):
    "Take title and promise from the first Markdown cell."
    text = next((c.source for c in nb.cells if c.cell_type == 'markdown'), '')
    lines = text.splitlines()
    title = next((line[2:].strip() for line in lines if line.startswith('# ')), lesson.name)
    number = lesson.name.split('_')[0]
    lesson.title = f'{number} {title}' if number.isdigit() else title
    lesson.promise = ' '.join(line[1:].strip() for line in lines if line.startswith('>'))


def output_html(output, title):
    "A picture or a table as HTML, or nothing for other outputs."
    data = output.get('data', {})
    for mime in ('image/png', 'image/jpeg'):
        if mime in data:
            source = ''.join(data[mime].split())
            picture = f'<img src="data:{mime};base64,{source}" alt="{html.escape(title)}">'
            return f'<div class="wide">{picture}</div>'
    table = data.get('image/svg+xml') or data.get('text/html')
    return f'<div class="wide">{table}</div>' if table else ''


def run_lesson(lesson, budget, out):
    "Run one lesson, and write its executed notebook and its page, also if it fails."
    nb = nbformat.read(lesson.path, as_version=4)
    read_header(lesson, nb)
    lesson.cells = sum(runs(c) for c in nb.cells)
    # What is committed must not pass for what ran now.
    for cell in nb.cells:
        if cell.cell_type == 'code':
            cell.outputs, cell.execution_count = [], None
    running = {}

    def on_cell_start(cell, cell_index):
        if runs(cell):
            lesson.cell += 1
            running['cell'] = cell

    client = NotebookClient(
        nb,
        kernel_manager_class=ThisPython,
        resources={'metadata': {'path': str(lesson.path.parent)}},
        # No cell is meant to take over 10 minutes, but at the budget of hours.
        timeout=None if budget == 'full' else 600,
        store_widget_state=False,
        on_cell_start=on_cell_start,
    )
    lesson.started = time.monotonic()
    try:
        client.execute()
    except Exception as error:  # a failing cell, one out of time, or a kernel that died
        cell = running.get('cell')
        failed = [o for o in (cell.outputs if cell else []) if o.output_type == 'error']
        trace = '\n'.join(failed[-1].traceback) if failed else f'{type(error).__name__}: {error}'
        lesson.traceback = strip_ansi(trace).strip()
        last = lesson.traceback.splitlines()[-1]
        where = f'code cell {lesson.cell} ({first_line(cell.source)})' if cell else 'the kernel'
        lesson.error = f'{where}: {last}'
    lesson.seconds = time.monotonic() - lesson.started

    for cell in nb.cells:
        if has_line(cell, 'gallery'):
            lesson.gallery += [output_html(output, lesson.title) for output in cell.outputs]
    nbformat.write(nb, out / f'{lesson.name}.ipynb')
    (out / lesson.page).write_text(lesson_page(lesson, nb), encoding='utf-8')


def lesson_page(lesson, nb):
    "The executed lesson as one HTML page, without the cells that only nbdev needs."
    page = nbformat.from_dict({**nb, 'cells': [c for c in nb.cells if not has_line(c, 'hide')]})
    # The course's widgets come with pictures of themselves, so the page needs no widget scripts.
    # Not embed_images: it would close the <details> of an answer before the answer.
    exporter = HTMLExporter(require_js_url='', jquery_url='')
    where = {'metadata': {'path': str(lesson.path.parent), 'name': lesson.title}}
    text, _ = exporter.from_notebook_node(page, resources=where)
    # Links from lesson to lesson lead from page to page.
    for other in lesson.path.parent.glob('*.ipynb'):
        text = text.replace(f'href="{other.name}', f'href="{page_name(other)}')
    # The toolbox is not run here: links lead to its notebooks.
    return re.sub(r'href="(toolbox|applications)/', r'href="../nbs/\1/', text)


STYLE = """
:root { color-scheme: light dark; --text: #1d2330; --soft: #5b6475; --page: #f5f6f8;
        --card: #fff; --line: #e1e4ea; --link: #1257b8; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8eaf0; --soft: #a2aabb; --page: #14171d; --card: #1e222b;
          --line: #313744; --link: #8ab4ff; --bad: #ff9b93; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
       font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 1rem 0 .25rem; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0; }
a { color: var(--link); }
h2 a { text-decoration: none; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
          padding: 1.25rem; margin-top: 1.25rem; }
p { margin: .35rem 0; }
.soft { color: var(--soft); font-size: .9rem; }
.bad { color: var(--bad); font-weight: 600; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; padding: 6px;
      background: #fff; border-radius: 8px; }
.wide { overflow-x: auto; margin-top: 1rem; }
.wide svg { max-width: 100%; height: auto; }
/* Four photos in a row are too small for a phone: there they can be moved sideways. */
@media (max-width: 700px) { .wide img { max-width: none; width: 44rem; } }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
"""


def gallery_page(lessons, budget, seconds):
    "All lessons on one page: what each promises, its best pictures, and the way to it."
    sections = []
    for lesson in lessons:
        failed = f'<p class="bad">Failed at {html.escape(lesson.error)}</p>' if lesson.error else ''
        promise = markdown2html(lesson.promise) if lesson.promise else ''
        sections.append(
            f'<section><h2><a href="{lesson.page}">{html.escape(lesson.title)}</a></h2>'
            f'{promise}'
            f'<p class="soft"><a href="{lesson.page}">page</a> · '
            f'<a href="{lesson.name}.ipynb">notebook</a> · '
            f'{lesson.seconds:.0f} s at the {budget} budget</p>'
            f'{failed}{"".join(lesson.gallery)}</section>'
        )
    almost_untrained = (
        '<p class="soft">At this budget the networks are almost untrained: '
        '<code>make course BUDGET=lesson</code> trains them.</p>'
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>The course</title><style>{STYLE}</style></head><body><main>'
        '<h1>The course</h1>'
        f'<p class="soft">{len(lessons)} notebooks, run top to bottom at the {budget} budget '
        f'in {seconds:.0f} s.</p>{almost_untrained if budget == "smoke" else ""}'
        f'{"".join(sections)}</main></body></html>\n'
    )


def show_progress(lessons, tasks):
    "Say what runs until all is done: one changing line on a terminal, else a line a lesson."
    live, said = sys.stdout.isatty(), set()
    while True:
        done, running = wait(tasks, timeout=0.3)
        for task in done - said:
            lesson = tasks[task]
            task.result()  # a fault of this script, rather than of a lesson, shows here
            state = f'FAILED at {lesson.error}' if lesson.error else f'{lesson.cells} cells'
            start = '\r\033[K' if live else ''
            print(f'{start}{lesson.name:20} {lesson.seconds:6.1f} s  {state}', flush=True)
        said |= done
        if live and running:
            now = time.monotonic()
            parts = [
                f'{one.name} {one.cell}/{one.cells} {now - one.started:.0f} s'
                for one in lessons
                if one.started and not one.seconds
            ]
            width = shutil.get_terminal_size().columns - 1
            print('\r\033[K' + '  |  '.join(parts)[:width], end='', flush=True)
        if not running:
            return


def find_lessons(names):
    "The notebooks in the order of the course, the front page first; `names` picks some of them."
    paths = sorted((ROOT / 'nbs').glob('*.ipynb'), key=lambda p: (p.stem != 'index', p.name))
    wanted = {Path(name).stem for name in names}
    unknown = wanted - {p.stem for p in paths}
    if unknown:
        raise SystemExit(f'No such lesson in nbs/: {", ".join(sorted(unknown))}')
    return [Lesson(p) for p in paths if p.stem in wanted or not wanted]


@call_parse
def main(
    *lessons: str,  # Names of lessons; without any, all of them
    budget: Annotated[str, {'choices': BUDGETS}] = 'smoke',  # The size to run at
    out: str = '_course',  # The folder to write to
):
    "Run the lessons and write executed notebooks, pages and a gallery."
    lessons = find_lessons(lessons)
    out = ROOT / out
    out.mkdir(parents=True, exist_ok=True)
    for lesson in lessons:  # nothing old may pass for this run's result
        for name in (lesson.path.name, lesson.page):
            (out / name).unlink(missing_ok=True)

    # Two at a time at the smallest size only: larger ones are measured, and need the memory.
    cores = os.cpu_count() or 1
    at_once = min(2, cores) if budget == 'smoke' else 1
    os.environ['ENHANCE_BUDGET'] = budget
    # Kernels that share the cores must not each start a thread a core.
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores // at_once)))
    print(f'Running {len(lessons)} notebooks at the {budget} budget, {at_once} at a time.')

    if (ROOT / 'nbs' / 'images').exists():
        shutil.copytree(ROOT / 'nbs' / 'images', out / 'images', dirs_exist_ok=True)
    started = time.monotonic()
    pool = ThreadPoolExecutor(at_once)
    tasks = {pool.submit(run_lesson, lesson, budget, out): lesson for lesson in lessons}
    try:
        show_progress(lessons, tasks)
    except KeyboardInterrupt:
        # Kernels end by themselves when this process has gone; waiting for them could take long.
        print('\nInterrupted.', flush=True)
        os._exit(130)
    pool.shutdown()

    index = out / 'index.html'
    took = time.monotonic() - started
    index.write_text(gallery_page(lessons, budget, took), encoding='utf-8')
    failures = [lesson for lesson in lessons if lesson.error]
    for lesson in failures:
        print(f'\nFAILED: {lesson.name}, {lesson.error}\n{lesson.traceback}')
    shown = os.path.relpath(index)
    print(f'\nThe gallery is {shown}: open it in a browser. To work on the lessons: make lab')
    if failures:
        names = ', '.join(lesson.name for lesson in failures)
        raise SystemExit(f'{len(failures)} of {len(lessons)} notebooks failed: {names}')
