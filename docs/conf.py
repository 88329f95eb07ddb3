"""The documentation's site: `sphinx-build -W docs site` writes it, and site/index.html opens from the disk.

The reference is made of the docstrings. Links into the code go by name, and quoted lines are found in the files: where
one is gone, the build fails.
"""

project = html_title = 'flax_dlvc'
html_theme = 'furo'
html_show_copyright = html_show_sphinx = html_copy_source = False

extensions = ['myst_parser', 'sphinx.ext.apidoc', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
exclude_patterns = ['results/table.md', 'reference/modules.rst']  # included in results.md; a list of one package
myst_heading_anchors = 3

apidoc_modules = [
    {
        'path': '../flax_dlvc',
        'destination': 'reference',
        'separate_modules': True,
        'module_first': True,
        'max_depth': 1,
    },
]
autodoc_default_options = {
    'members': True,
    'member-order': 'bysource',
    'special-members': '__call__',
    'exclude-members': '__init__, __new__, name, parent, scope, replace',  # that all flax modules and dataclasses have
}
autodoc_class_signature = 'separated'
napoleon_use_ivar = True
default_role = 'code'  # docstrings quote as Markdown does
