@echo off
rem Double-click in the Explorer. The first start sets Slipstream up and takes some minutes.
title Slipstream
cd /d "%~dp0..\.."
where py >nul 2>nul
if not errorlevel 1 (
    py -3 launch.py %*
    goto done
)
where python >nul 2>nul
if not errorlevel 1 (
    python launch.py %*
    goto done
)
echo Slipstream needs Python 3.10 to 3.13 from https://www.python.org/downloads/
pause
exit /b 1
:done
if errorlevel 1 pause
