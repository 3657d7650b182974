"""What stock vLLM needs: the parts of the plug-in, its command line, what the gateway says to it."""
