"""Studies: experiments made of many trainings, under one parent MLflow run, with a table and figures at their end."""
