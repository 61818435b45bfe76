"""Systems with structured output: pose, gaze, scanpaths, restoration, speech, slides, forecasts, recommendation."""
