import sys

from . import avg, fine_grained, pivots, pointwise, reward, trainers
from .runs import main

MODULES = (avg, fine_grained, pivots, pointwise, reward, trainers)
STUDIES = {module.STUDY.name: module.STUDY for module in MODULES}

if __name__ == "__main__":
    sys.exit(main(STUDIES))
