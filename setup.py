"Everything about the package stands in settings.ini; this file hands it to setuptools."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(root / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']


def lines(key):
    "The non-empty lines of a setting that holds a list."
    return [line.strip() for line in cfg[key].splitlines() if line.strip()]


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(root / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license=cfg['license'],
    url=f'https://github.com/{cfg["user"]}/{cfg["repo"]}',
    python_requires=f'>={cfg["min_python"]}',
    packages=find_packages(include=['enhance_lib*']),
    package_data={'enhance_lib': ['weights/*']},
    install_requires=lines('requirements'),
    extras_require={'dev': lines('dev_requirements')},
    entry_points={'console_scripts': lines('console_scripts')},
)
