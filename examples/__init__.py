# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Makes the folder a package, since setup.py installs the command from it as `difference_inversion`."""

import os


# Set before transformers is imported, which would warn the command's users of packages that nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
