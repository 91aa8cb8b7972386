target="${BACKUP_TARGET:-/var/backups}"
folders=(/etc /home)
