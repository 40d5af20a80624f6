"""The destination's data path: urgent and background requests over the page call, one placement step."""
