"""``python -m l3env.cli``."""

from l3env.cli import main

main()
