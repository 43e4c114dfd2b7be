import sys

from . import avg, fine_grained, pivots, pointwise, reward
from .runs import main

STUDIES = {study.name: study for study in (avg.STUDY, fine_grained.STUDY, pivots.STUDY, pointwise.STUDY, reward.STUDY)}

if __name__ == "__main__":
    sys.exit(main(STUDIES))
