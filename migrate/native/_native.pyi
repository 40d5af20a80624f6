# The compiled extension. cffi knows the types; the facade modules beside this file give them to Python.

from typing import Any

ffi: Any
lib: Any
