"""`python -m localrl` is the `localrl` command."""

from localrl.cli.main import main

main()
