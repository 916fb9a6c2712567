"""Training room: datasets, models by name, recipes, checkpoints, plots and the command line.

The only package that knows about datasets. It needs the extra ``train``:
``pip install 'ato-fast[train]'``.
"""
