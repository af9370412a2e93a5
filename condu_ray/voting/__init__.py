"""How the experts of a version answer together: prototypes, routing, weights, label spaces."""
