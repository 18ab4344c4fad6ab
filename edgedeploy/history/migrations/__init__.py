"""How the tables of the history's store came to be, one file a step; Alembic runs them."""
