"""Hold a quickstart's results.json to what the README promises of it. Exits with 1 and says why if it does not."""

import sys
from pathlib import Path

from arrest_hub.results import read_results

report = read_results(Path(sys.argv[1]))
teacher_clean, teacher_robust = (row.value for row in report.teacher_results)
clean, robust = (row.value for row in report.results)
checks = {
    "the teacher falls below 20 % under PGD-20": teacher_robust < 0.20,
    "the student's clean accuracy is within 3 points of the teacher's": clean >= teacher_clean - 0.03,
    "the student's PGD-20 accuracy is at least 40 points above the teacher's": robust >= teacher_robust + 0.40,
    "the attack is PGD-20": all(rows[1].attack == "pgd-20" for rows in (report.results, report.teacher_results)),
}
for promise, kept in checks.items():
    print(f"{'ok ' if kept else 'NOT'} {promise}")
sys.exit(not all(checks.values()))
