"What lies beside the project, where it is there: data and an independent measure."

import importlib.util
from functools import cache
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parent.parent.parent / 'shared'


@cache
def yardstick():
    "The independent measure beside the project."
    spec = importlib.util.spec_from_file_location('yardstick', SHARED / 'tools' / 'yardstick.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needs(path):
    "Skip where a file or folder beside the project is missing, as it is for most."
    return pytest.mark.skipif(
        not path.exists(), reason=f'there is no {path.name} beside the project'
    )
