"""What all tests need of their process."""

import signal

# a shell has SIGINT ignored in what it starts in the background, and children of the tests would inherit that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
