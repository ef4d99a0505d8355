import sys

from mmfused.cli import main

sys.exit(main())
