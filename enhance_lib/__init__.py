"A course on photo enhancement with deep learning, and the tools it builds."

from importlib.metadata import version

__version__ = version('enhance_lib')  # stands once, in settings.ini
