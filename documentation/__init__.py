"""What the documentation is made with: pages that are written from the sources, and what reads commands out of pages.

`make docs` builds the site from `docs/` and `mkdocs.yml`; nothing here is part of the installed package.
"""
