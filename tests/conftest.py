"""What holds for all tests."""

import signal

# Whoever starts the tests in the background lets them ignore Ctrl-C, and all that they start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
