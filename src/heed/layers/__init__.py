"""Drop-in modules that mix tokens, one file per mechanism. They call the engine, never a backend."""
