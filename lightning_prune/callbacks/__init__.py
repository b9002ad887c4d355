"""Lightning callbacks: hooks only; the algorithms are the functions of the package."""
