"""python -m continuum.cli"""

from continuum.cli import main

main()
