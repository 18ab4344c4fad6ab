"""History: what bench_results/ says over time, indexed for questions, and where a cell's level changed."""
