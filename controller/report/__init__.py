"""One page of a run, or of several: read the folders, judge the numbers, write one HTML file or serve it.

run_files   the folder of a run, read; nothing of it is executed
curves      metrics by topic, thinned out where they are long; spikes
health      what the curves say, in words
rollouts    Parquet files of rollouts as blocks of compressed columns, within a budget
drawing     where each node of the graph stands
payload     all of it as plain data, by run;  compare: what differs between runs
page        the HTML file: a skeleton, a chart library, scripts, and blocks of data
server      the same page of a run that goes on
"""
