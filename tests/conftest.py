"""What all tests need of their process."""

import os
import signal

# a shell has SIGINT ignored in what it starts in the background, and children of the tests would inherit that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# tables are laid out for the terminal that COLUMNS tells of, and tests read them
os.environ.pop("COLUMNS", None)
