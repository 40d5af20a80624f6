"""The C core through cffi: one typed facade module for each room of it.

GIL rule: cffi drops the GIL around every call. On the destination, Python never dereferences guest RAM before END; C
does, and never calls back into Python from the fault path.
"""
